//! Memory that Python lends: buffers to send from and to receive into, and new `bytes`.
//!
//! What Python guarantees for an exported buffer is that its
//! memory stays where it is until it is released; another thread may still change the bytes of a
//! mutable one meanwhile, as it may under `socket.send`. Such bytes only ever go through the
//! kernel or the opaque copy into a ring, never through Rust code that would rely on them.

use std::mem::MaybeUninit;

use pyo3::exceptions::{PyMemoryError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Room for the description of one lent buffer. Made where it stays: exporters may point into it.
pub(crate) struct View(ffi::Py_buffer);

impl View {
    pub(crate) fn new() -> Self {
        Self(ffi::Py_buffer::new())
    }
}

/// A contiguous buffer of some object, held until dropped.
struct Lent<'view> {
    view: &'view mut ffi::Py_buffer,
}

impl<'view> Lent<'view> {
    fn new(view: &'view mut View, object: &Bound<'_, PyAny>, flags: i32) -> PyResult<Self> {
        let view = &mut view.0;
        // SAFETY: PyObject_GetBuffer needs a live object, a writable Py_buffer and the GIL, which
        // `object` proves. On failure it sets an exception and leaves nothing to release.
        if unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *view, flags) } != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        Ok(Self { view })
    }

    fn len(&self) -> usize {
        // Py_ssize_t of an exported buffer is never negative.
        usize::try_from(self.view.len).unwrap_or(0)
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        // SAFETY: `view` was filled by PyObject_GetBuffer, has not moved since, and is released
        // once; every `Lent` is a local of a method and dropped there, with the GIL held.
        unsafe { ffi::PyBuffer_Release(&raw mut *self.view) };
    }
}

// SAFETY: a `Lent` is only read from other threads (its pointer and length), by code that runs
// while the method that owns it waits for that code with the GIL dropped.
unsafe impl Sync for Lent<'_> {}

/// The bytes of `object`, any C-contiguous buffer, for reading.
pub(crate) struct Source<'view>(Lent<'view>);

impl<'view> Source<'view> {
    pub(crate) fn new(view: &'view mut View, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Lent::new(view, object, ffi::PyBUF_SIMPLE).map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        let len = self.0.len();
        if len == 0 {
            return &[];
        }
        // SAFETY: from_raw_parts needs a non-null pointer valid for `len` bytes while the slice
        // lives: the buffer is exported until `self` is dropped. That nobody changes the bytes
        // cannot be promised for a mutable object used by another thread; see the module.
        unsafe { std::slice::from_raw_parts(self.0.view.buf.cast::<u8>(), len) }
    }
}

/// The bytes of `object`, any writable C-contiguous buffer, for receiving into.
pub(crate) struct Sink<'view>(Lent<'view>);

impl<'view> Sink<'view> {
    pub(crate) fn new(view: &'view mut View, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Lent::new(view, object, ffi::PyBUF_WRITABLE).map(Self).map_err(|_| {
            // As the socket module says it.
            let class = object.get_type();
            PyTypeError::new_err(format!("a read-write bytes-like object is needed, not {class}"))
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn bytes(&mut self) -> &mut [MaybeUninit<u8>] {
        let len = self.0.len();
        if len == 0 {
            return &mut [];
        }
        // SAFETY: from_raw_parts_mut needs a non-null pointer valid for writes of `len` bytes
        // while the slice lives: the buffer was exported as writable until `self` is dropped, and
        // `&mut self` makes this the only slice of this call. The runtime stores only initialised
        // bytes into it. Another thread's use of the object is as in the module's text.
        unsafe { std::slice::from_raw_parts_mut(self.0.view.buf.cast::<MaybeUninit<u8>>(), len) }
    }
}

/// A `bytes` of at most `len` bytes, filled by `fill`, which returns how many it stored.
pub(crate) fn new_bytes<'py>(
    py: Python<'py>,
    len: usize,
    fill: impl FnOnce(&mut [MaybeUninit<u8>]) -> PyResult<usize>,
) -> PyResult<Bound<'py, PyBytes>> {
    let size = ffi::Py_ssize_t::try_from(len).map_err(|_| PyMemoryError::new_err(()))?;
    // SAFETY: PyBytes_FromStringAndSize takes a null pointer for "uninitialised" and needs the
    // GIL; it returns a new reference or null with an exception set, which `from_owned_ptr_or_err`
    // handles. The object is a `bytes`.
    let bytes = unsafe {
        Bound::from_owned_ptr_or_err(py, ffi::PyBytes_FromStringAndSize(std::ptr::null(), size))?
            .cast_into_unchecked::<PyBytes>()
    };
    // SAFETY: PyBytes_AsString of a `bytes` gives its memory, valid for `len` bytes (and a zero
    // behind them). Nobody else has a reference to the new object yet, so writing is allowed.
    let memory = unsafe {
        std::slice::from_raw_parts_mut(
            ffi::PyBytes_AsString(bytes.as_ptr()).cast::<MaybeUninit<u8>>(),
            len,
        )
    };
    let filled = fill(memory)?;
    if filled == len {
        return Ok(bytes);
    }
    // SAFETY: `fill` stored the first `filled <= len` bytes, so they are initialised.
    let stored = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), filled) };
    Ok(PyBytes::new(py, stored))
}
