//! `Stream`: the socket methods of a session.

use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use ivsmc::{Error, RecvFlags, Session, Shutdown, Side, Timeout};
use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use crate::address;
use crate::detach::detach;
use crate::errors;
use crate::gil::{timeout, Gil};
use crate::memory::{new_bytes, Sink, Source, View};

/// `SOCK_STREAM` and `IPPROTO_TCP` of Linux.
const SOCK_STREAM: i32 = 1;
const IPPROTO_TCP: i32 = 6;

/// Message flags of Linux.
const MSG_OOB: i32 = 0x1;
const MSG_PEEK: i32 = 0x2;
const MSG_DONTWAIT: i32 = 0x40;
const MSG_WAITALL: i32 = 0x100;
const MSG_NOSIGNAL: i32 = 0x4000;
const MSG_MORE: i32 = 0x8000;
const MSG_CMSG_CLOEXEC: i32 = 0x4000_0000;

/// What the `recvmsg` methods return: the data, no ancillary data, no flags, no address.
type Message<'py, T> = (T, Bound<'py, PyList>, i32, Option<i32>);

/// A connection that is set up and not yet a `Stream`; dropping it closes it.
#[pyclass(frozen, module = "ivsmc._native")]
pub(crate) struct Handle(Mutex<Option<(Session, i32)>>);

impl Handle {
    /// `family` is that of the TCP connection.
    pub(crate) fn new(session: Session, family: i32) -> Self {
        Self(Mutex::new(Some((session, family))))
    }

    fn take(&self) -> Option<(Session, i32)> {
        self.0.lock().ok()?.take()
    }
}

/// Why a session goes over TCP.
#[pyclass(frozen, get_all, module = "ivsmc._native")]
pub(crate) struct Fallback {
    name: &'static str,
    code: u32,
    sentence: String,
    side: &'static str,
}

/// A connected stream; the methods are those of `socket.socket`.
#[pyclass(frozen, subclass, module = "ivsmc._native")]
pub(crate) struct Stream {
    session: Session,
    family: i32,
    /// Seconds as the bits of an `f64`; NaN for none.
    timeout: AtomicU64,
}

impl Stream {
    fn seconds(&self) -> Option<f64> {
        let seconds = f64::from_bits(self.timeout.load(Ordering::Relaxed));
        (!seconds.is_nan()).then_some(seconds)
    }

    fn wait(&self, flags: i32) -> PyResult<Timeout> {
        let seconds = self.seconds();
        // As the socket module does: with a timeout its socket does not block anyway, and it waits.
        if flags & MSG_DONTWAIT != 0 && seconds.is_none() {
            return Ok(Timeout::NonBlocking);
        }
        timeout(seconds)
    }

    /// Receives up to `bufsize` bytes as new `bytes`.
    fn receive<'py>(
        &self,
        py: Python<'py>,
        bufsize: isize,
        flags: i32,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bufsize = usize::try_from(bufsize)
            .map_err(|_| PyValueError::new_err("negative buffersize in recv"))?;
        let wait = self.wait(flags)?;
        let flags = receive_flags(flags)?;
        let gil = Gil::new(py);
        let mut size = bufsize;
        if self.session.is_smc() && !flags.wait_all && bufsize > 0 {
            // Exactly what is there, so that nothing is allocated in vain or copied twice.
            size = size.min(self.session.readable(wait, &gil).map_err(|e| gil.raise(e))?);
            if size == 0 {
                return Ok(PyBytes::new(py, b""));
            }
        }
        new_bytes(py, size, |into| {
            self.session.recv(into, flags, wait, &gil).map_err(|e| gil.raise(e))
        })
    }
}

fn receive_flags(flags: i32) -> PyResult<RecvFlags> {
    const KNOWN: i32 = MSG_PEEK | MSG_WAITALL | MSG_DONTWAIT | MSG_NOSIGNAL | MSG_CMSG_CLOEXEC;
    refuse(flags, KNOWN)?;
    Ok(RecvFlags { peek: flags & MSG_PEEK != 0, wait_all: flags & MSG_WAITALL != 0 })
}

fn send_flags(flags: i32) -> PyResult<()> {
    // MSG_MORE only asks to delay, which a ring has no reason to.
    refuse(flags, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE)
}

fn refuse(flags: i32, known: i32) -> PyResult<()> {
    if flags & !known == 0 {
        return Ok(());
    }
    let what = if flags & MSG_OOB != 0 {
        "MSG_OOB: a session has no urgent data; send it in the stream".to_owned()
    } else {
        format!("message flags {:#x} are not supported by a session", flags & !known)
    };
    Err(PyOSError::new_err((Error::ApiMisuse(String::new()).errno(), what)))
}

#[pymethods]
impl Stream {
    #[new]
    fn new(handle: &Handle) -> PyResult<Self> {
        let (session, family) =
            handle.take().ok_or_else(|| PyValueError::new_err("the handle was used already"))?;
        Ok(Self { session, family, timeout: AtomicU64::new(f64::NAN.to_bits()) })
    }

    /// Address family of the TCP connection.
    #[getter]
    fn family(&self) -> i32 {
        self.family
    }

    /// ``SOCK_STREAM``.
    #[getter(r#type)]
    fn kind(&self) -> i32 {
        SOCK_STREAM
    }

    /// ``IPPROTO_TCP``.
    #[getter]
    fn proto(&self) -> i32 {
        IPPROTO_TCP
    }

    /// Seconds a call waits.
    #[getter(timeout)]
    fn timeout_attribute(&self) -> Option<f64> {
        self.seconds()
    }

    /// Whether the stream is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.session.is_closed()
    }

    /// What the bytes go through: shared memory or TCP.
    #[getter]
    fn transport(&self) -> &'static str {
        if self.session.is_smc() {
            "smc"
        } else {
            "tcp"
        }
    }

    /// Why it is TCP; None on shared memory.
    #[getter]
    fn fallback_reason(&self) -> Option<Fallback> {
        self.session.fallback().map(|fallback| Fallback {
            name: fallback.reason.name(),
            code: fallback.code,
            sentence: fallback.sentence.clone(),
            side: match fallback.side {
                Side::Local => "local",
                Side::Peer => "peer",
            },
        })
    }

    /// Return counters: bytes each way, wakes over TCP and by doorbell, waits, buffer sizes, device.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.session.stats();
        let dict = PyDict::new(py);
        dict.set_item("transport", self.transport())?;
        dict.set_item("bytes_sent", stats.bytes_sent)?;
        dict.set_item("bytes_received", stats.bytes_received)?;
        dict.set_item("wakes_sent", stats.wakes_sent)?;
        dict.set_item("wakes_received", stats.wakes_received)?;
        dict.set_item("doorbells_sent", stats.doorbells_sent)?;
        dict.set_item("doorbells_received", stats.doorbells_received)?;
        dict.set_item("sleeps", stats.sleeps)?;
        dict.set_item("send_buffer", stats.send_buffer)?;
        dict.set_item("receive_buffer", stats.receive_buffer)?;
        dict.set_item("device", stats.device)?;
        dict.set_item("peer", stats.peer.map(|peer| peer.to_string()))?;
        Ok(dict)
    }

    /// Send some of ``data``; return the bytes taken.
    #[pyo3(signature = (data, flags = 0, /))]
    fn send(&self, py: Python<'_>, data: &Bound<'_, PyAny>, flags: i32) -> PyResult<usize> {
        send_flags(flags)?;
        let wait = self.wait(flags)?;
        let mut view = View::new();
        let data = Source::new(&mut view, data)?;
        let gil = Gil::new(py);
        self.session.send(data.bytes(), wait, &gil).map_err(|error| gil.raise(error))
    }

    /// Send all of ``data``; the timeout is for the whole call.
    #[pyo3(signature = (data, flags = 0, /))]
    fn sendall(&self, py: Python<'_>, data: &Bound<'_, PyAny>, flags: i32) -> PyResult<()> {
        send_flags(flags)?;
        let wait = self.wait(flags)?;
        let mut view = View::new();
        let data = Source::new(&mut view, data)?;
        let gil = Gil::new(py);
        self.session.send_all(data.bytes(), wait, &gil).map_err(|error| gil.raise(error))
    }

    /// Send some of ``buffers``, in order; return the bytes taken. ``ancdata`` must be empty.
    #[pyo3(signature = (buffers, ancdata = None, flags = 0, address = None, /))]
    fn sendmsg(
        &self,
        py: Python<'_>,
        buffers: &Bound<'_, PyAny>,
        ancdata: Option<&Bound<'_, PyAny>>,
        flags: i32,
        address: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        send_flags(flags)?;
        if let Some(ancdata) = ancdata {
            if ancdata.try_iter()?.next().is_some() {
                return Err(PyOSError::new_err((
                    Error::ApiMisuse(String::new()).errno(),
                    "ancillary data cannot be sent over a session",
                )));
            }
        }
        // A connected stream ignores the address, as TCP does.
        let _ = address;
        let wait = self.wait(flags)?;
        let objects = buffers.try_iter()?.collect::<PyResult<Vec<_>>>()?;
        let mut views: Vec<_> = objects.iter().map(|_| View::new()).collect();
        let sources = objects
            .iter()
            .zip(&mut views)
            .map(|(object, view)| Source::new(view, object))
            .collect::<PyResult<Vec<_>>>()?;
        let slices: Vec<_> = sources.iter().map(|source| IoSlice::new(source.bytes())).collect();
        let gil = Gil::new(py);
        self.session.send_vectored(&slices, wait, &gil).map_err(|error| gil.raise(error))
    }

    /// Receive up to ``bufsize`` bytes; empty at the end of the stream.
    ///
    /// Flags: ``MSG_PEEK``, ``MSG_DONTWAIT``, ``MSG_WAITALL``. ``MSG_OOB`` is refused.
    #[pyo3(signature = (bufsize, flags = 0, /))]
    fn recv<'py>(
        &self,
        py: Python<'py>,
        bufsize: isize,
        flags: i32,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.receive(py, bufsize, flags)
    }

    /// Receive into ``buffer``, at most ``nbytes`` (0: all of it); return the bytes written.
    #[pyo3(signature = (buffer, nbytes = 0, flags = 0))]
    fn recv_into(
        &self,
        py: Python<'_>,
        buffer: &Bound<'_, PyAny>,
        nbytes: isize,
        flags: i32,
    ) -> PyResult<usize> {
        let mut view = View::new();
        let mut sink = Sink::new(&mut view, buffer)?;
        let nbytes = usize::try_from(nbytes)
            .map_err(|_| PyValueError::new_err("negative buffersize in recv_into"))?;
        if nbytes > sink.len() {
            return Err(PyValueError::new_err("buffer too small for requested bytes"));
        }
        let size = if nbytes == 0 { sink.len() } else { nbytes };
        let wait = self.wait(flags)?;
        let flags = receive_flags(flags)?;
        let gil = Gil::new(py);
        self.session
            .recv(&mut sink.bytes()[..size], flags, wait, &gil)
            .map_err(|error| gil.raise(error))
    }

    /// Receive as ``recv``; return (data, no ancillary data, flags, None).
    #[pyo3(signature = (bufsize, ancbufsize = 0, flags = 0, /))]
    fn recvmsg<'py>(
        &self,
        py: Python<'py>,
        bufsize: isize,
        ancbufsize: isize,
        flags: i32,
    ) -> PyResult<Message<'py, Bound<'py, PyBytes>>> {
        if bufsize < 0 {
            return Err(PyValueError::new_err("negative buffer size in recvmsg()"));
        }
        check_ancillary(ancbufsize)?;
        Ok((self.receive(py, bufsize, flags)?, PyList::empty(py), 0, None))
    }

    /// Receive into ``buffers`` in order; return (bytes, no ancillary data, flags, None).
    #[pyo3(signature = (buffers, ancbufsize = 0, flags = 0, /))]
    fn recvmsg_into<'py>(
        &self,
        py: Python<'py>,
        buffers: &Bound<'py, PyAny>,
        ancbufsize: isize,
        flags: i32,
    ) -> PyResult<Message<'py, usize>> {
        check_ancillary(ancbufsize)?;
        let objects = buffers.try_iter()?.collect::<PyResult<Vec<_>>>()?;
        let mut views: Vec<_> = objects.iter().map(|_| View::new()).collect();
        let mut sinks = objects
            .iter()
            .zip(&mut views)
            .map(|(object, view)| Sink::new(view, object))
            .collect::<PyResult<Vec<_>>>()?;
        let mut wait = self.wait(flags)?;
        let flags = receive_flags(flags)?;
        let gil = Gil::new(py);
        if flags.peek && sinks.iter().filter(|sink| sink.len() > 0).count() > 1 {
            // Each part of a peek would start at the front again: peek once and deal out.
            return self.peek_into(py, sinks, wait, flags);
        }
        let mut total = 0;
        for sink in &mut sinks {
            let size = sink.len();
            if size == 0 {
                continue;
            }
            let got = match self.session.recv(sink.bytes(), flags, wait, &gil) {
                Ok(got) => got,
                // What a signal handler raised must not get lost; see `Session::recv`.
                Err(error) if total == 0 || matches!(error, Error::Interrupted) => {
                    return Err(gil.raise(error));
                }
                Err(error) => {
                    self.session.leave_error(&error);
                    break;
                }
            };
            total += got;
            if got < size {
                break;
            }
            if !flags.wait_all {
                wait = Timeout::NonBlocking;
            }
        }
        Ok((total, PyList::empty(py), 0, None))
    }

    /// End one direction or both: ``SHUT_RD``, ``SHUT_WR``, ``SHUT_RDWR``.
    #[pyo3(signature = (how, /))]
    fn shutdown(&self, py: Python<'_>, how: i32) -> PyResult<()> {
        let how = match how {
            0 => Shutdown::Read,
            1 => Shutdown::Write,
            2 => Shutdown::Both,
            _ => return Err(PyOSError::new_err((22, "Invalid argument"))),
        };
        self.session.shutdown(how).map_err(|error| errors::to_python(py, error))
    }

    /// Set the seconds a call waits.
    #[pyo3(signature = (value, /))]
    fn settimeout(&self, value: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let seconds = match value {
            None => None,
            Some(value) => Some(value.extract::<f64>()?),
        };
        if let Some(seconds) = seconds {
            if seconds.is_nan() || seconds < 0.0 {
                return Err(PyValueError::new_err("Timeout value out of range"));
            }
        }
        self.timeout.store(seconds.unwrap_or(f64::NAN).to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// Return the seconds a call waits.
    fn gettimeout(&self) -> Option<f64> {
        self.seconds()
    }

    /// Wait for ever, or not at all.
    #[pyo3(signature = (flag, /))]
    fn setblocking(&self, flag: &Bound<'_, PyAny>) -> PyResult<()> {
        let seconds = if flag.is_truthy()? { f64::NAN } else { 0.0 };
        self.timeout.store(seconds.to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// Whether calls wait.
    fn getblocking(&self) -> bool {
        self.seconds() != Some(0.0)
    }

    /// Return a descriptor that tells readiness (poll, level-triggered); -1 when closed.
    ///
    /// It carries no data: never read from it or write to it.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        match self.session.fileno() {
            Err(Error::Closed) => Ok(-1),
            other => other.map_err(|error| errors::to_python(py, error)),
        }
    }

    /// Return the peer's address.
    fn getpeername<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let address = self.session.peer_addr().map_err(|error| errors::to_python(py, error))?;
        address::to_tuple(py, &address)
    }

    /// Return the own address.
    fn getsockname<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let address = self.session.local_addr().map_err(|error| errors::to_python(py, error))?;
        address::to_tuple(py, &address)
    }

    /// Read an option of the TCP connection.
    #[pyo3(signature = (level, option, buflen = 0, /))]
    fn getsockopt<'py>(
        &self,
        py: Python<'py>,
        level: i32,
        option: i32,
        buflen: isize,
    ) -> PyResult<Bound<'py, PyAny>> {
        get_option(py, buflen, |into| self.session.get_option(level, option, into))
    }

    /// Set an option of the TCP connection.
    #[pyo3(signature = (level, option, value, optlen = None, /))]
    fn setsockopt(
        &self,
        py: Python<'_>,
        level: i32,
        option: i32,
        value: Option<&Bound<'_, PyAny>>,
        optlen: Option<usize>,
    ) -> PyResult<()> {
        set_option(py, value, optlen, |bytes| self.session.set_option(level, option, bytes))
    }

    fn _close(&self, py: Python<'_>) {
        // It takes locks that a thread without the GIL may hold for a copy.
        detach(py, || self.session.close());
    }
}

impl Stream {
    fn peek_into<'py>(
        &self,
        py: Python<'py>,
        mut sinks: Vec<Sink<'_>>,
        wait: Timeout,
        flags: RecvFlags,
    ) -> PyResult<Message<'py, usize>> {
        let gil = Gil::new(py);
        let size = sinks.iter().map(Sink::len).sum();
        let bytes = new_bytes(py, size, |into| {
            self.session.recv(into, flags, wait, &gil).map_err(|error| gil.raise(error))
        })?;
        let mut rest = bytes.as_bytes();
        for sink in &mut sinks {
            let n = rest.len().min(sink.len());
            for (to, from) in sink.bytes().iter_mut().zip(&rest[..n]) {
                to.write(*from);
            }
            rest = &rest[n..];
        }
        Ok((bytes.as_bytes().len(), PyList::empty(py), 0, None))
    }
}

fn check_ancillary(size: isize) -> PyResult<()> {
    if size < 0 {
        return Err(PyValueError::new_err("invalid ancillary data buffer length"));
    }
    Ok(())
}

/// `getsockopt` of Python over `read`: an int without `buflen`, else bytes.
pub(crate) fn get_option<'py>(
    py: Python<'py>,
    buflen: isize,
    read: impl FnOnce(&mut [u8]) -> ivsmc::Result<usize>,
) -> PyResult<Bound<'py, PyAny>> {
    if buflen == 0 {
        let mut value = [0; 4];
        read(&mut value).map_err(|error| errors::to_python(py, error))?;
        return Ok(i32::from_ne_bytes(value).into_pyobject(py)?.into_any());
    }
    let buflen = usize::try_from(buflen)
        .ok()
        .filter(|&len| len <= 1024)
        .ok_or_else(|| PyOSError::new_err("getsockopt buflen out of range"))?;
    let mut value = [0; 1024];
    let len = read(&mut value[..buflen]).map_err(|error| errors::to_python(py, error))?;
    Ok(PyBytes::new(py, &value[..len]).into_any())
}

/// `setsockopt` of Python over `write`: an int, a buffer, or None with a length.
pub(crate) fn set_option(
    py: Python<'_>,
    value: Option<&Bound<'_, PyAny>>,
    optlen: Option<usize>,
    write: impl FnOnce(&[u8]) -> ivsmc::Result<()>,
) -> PyResult<()> {
    let result = match (value, optlen) {
        (None, Some(len)) if len <= 1024 => write(&[0; 1024][..len]),
        (None, _) => return Err(PyTypeError::new_err("a value or None with a length is needed")),
        (Some(_), Some(_)) => return Err(PyTypeError::new_err("a length needs value None")),
        (Some(value), None) => match value.extract::<i32>() {
            Ok(number) => write(&number.to_ne_bytes()),
            Err(_) => write(Source::new(&mut View::new(), value)?.bytes()),
        },
    };
    result.map_err(|error| errors::to_python(py, error))
}
