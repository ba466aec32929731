//! `Acceptor`: a listening socket and its directory entries.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use ivsmc::{Error, ListenOptions, Listener};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::address;
use crate::connect::{buffer, require};
use crate::detach::detach;
use crate::errors;
use crate::gil::{timeout, Gil};
use crate::stream::{get_option, set_option, Handle};

/// A listening TCP socket and its entry in every region's directory.
#[pyclass(frozen, module = "ivsmc._native")]
pub(crate) struct Acceptor {
    listener: Listener,
    family: i32,
    closed: AtomicBool,
}

#[pymethods]
impl Acceptor {
    #[new]
    fn new(
        py: Python<'_>,
        fd: RawFd,
        backlog: i64,
        shared: bool,
        device: Option<Bound<'_, PyAny>>,
        require: Option<&str>,
        buffer: Option<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        // First of all: it is ours to close from now on, whatever follows. So arguments that may be
        // of any type are judged here.
        let fd = Fd::adopt(fd)?;
        let device: Option<String> = argument("device", "str", device.as_ref())?;
        let buffer: Option<i64> = argument("buffer", "int", buffer.as_ref())?;
        let require = self::require(require)?;
        let buffer = self::buffer(buffer)?;
        // As the kernel does: it takes any number, and less than one is one.
        let backlog = u32::try_from(backlog.max(1)).unwrap_or(u32::MAX);
        let options =
            ListenOptions { backlog, shared, device, require, buffer, ..ListenOptions::default() };
        let listener = detach(py, || Listener::adopt(fd, options))
            .map_err(|error| errors::to_python(py, error))?;
        let family = address::family(&listener.local_addr());
        Ok(Self { listener, family, closed: AtomicBool::new(false) })
    }

    #[getter]
    fn family(&self) -> i32 {
        self.family
    }

    #[getter]
    fn closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    #[pyo3(signature = (timeout, /))]
    fn accept<'py>(
        &self,
        py: Python<'py>,
        timeout: Option<f64>,
    ) -> PyResult<(Handle, Bound<'py, PyTuple>)> {
        let gil = Gil::new(py);
        let (session, address) = self
            .listener
            .accept(self::timeout(timeout)?, &gil)
            .map_err(|error| gil.raise(error))?;
        Ok((Handle::new(session, self.family), address::to_tuple(py, &address)?))
    }

    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        // The first time in a child it opens devices.
        match detach(py, || self.listener.fileno()) {
            Err(Error::Closed) => Ok(-1),
            other => other.map_err(|error| errors::to_python(py, error)),
        }
    }

    fn getsockname<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        // A closed socket has no name.
        self.listener.socket().map_err(|error| errors::to_python(py, error))?;
        address::to_tuple(py, &self.listener.local_addr())
    }

    #[pyo3(signature = (level, option, buflen = 0, /))]
    fn getsockopt<'py>(
        &self,
        py: Python<'py>,
        level: i32,
        option: i32,
        buflen: isize,
    ) -> PyResult<Bound<'py, PyAny>> {
        get_option(py, buflen, |into| {
            Ok(net::get_option(&*self.listener.socket()?, level, option, into)?)
        })
    }

    #[pyo3(signature = (level, option, value, optlen = None, /))]
    fn setsockopt(
        &self,
        py: Python<'_>,
        level: i32,
        option: i32,
        value: Option<&Bound<'_, PyAny>>,
        optlen: Option<usize>,
    ) -> PyResult<()> {
        set_option(py, value, optlen, |bytes| {
            Ok(net::set_option(&*self.listener.socket()?, level, option, bytes)?)
        })
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.listener.stats().map_err(|error| errors::to_python(py, error))?;
        let dict = PyDict::new(py);
        dict.set_item("accepted_smc", stats.accepted_smc)?;
        dict.set_item("accepted_tcp", stats.accepted_tcp)?;
        dict.set_item("handshakes", stats.handshakes)?;
        dict.set_item("ready", stats.ready)?;
        Ok(dict)
    }

    fn close(&self, py: Python<'_>) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            detach(py, || self.listener.close());
        }
    }
}

/// An argument that may be None, as Rust has it.
fn argument<'a, 'py, T>(
    name: &str,
    wanted: &str,
    given: Option<&'a Bound<'py, PyAny>>,
) -> PyResult<Option<T>>
where
    T: FromPyObject<'a, 'py, Error = PyErr>,
{
    let convert = |given: &'a Bound<'py, PyAny>| {
        given.extract().map_err(|error: PyErr| {
            if error.is_instance_of::<PyTypeError>(given.py()) {
                PyTypeError::new_err(format!("{name} must be {wanted} or None: {error}"))
            } else {
                error
            }
        })
    };
    given.map(convert).transpose()
}
