//! Going on without the GIL, never back into an interpreter that is gone, and what is done then.
//!
//! Before Python 3.14 a daemon thread that asks for the GIL while the interpreter ends is ended
//! by `pthread_exit`, which unwinds its stack; Rust code there makes the C library abort the whole
//! process. PyO3's `Python::detach` lets that happen. Here such a thread sleeps until the process
//! has ended, as it does from Python 3.14 on.
//!
//! Only then sessions are closed in the name of the process ([`close_all_at_end`]): that wakes the
//! threads inside them, and while the interpreter lived they would come back with an error.

use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;

/// The interpreter has ended.
static ENDED: AtomicBool = AtomicBool::new(false);

mod raw {
    use pyo3::ffi::PyThreadState;

    extern "C-unwind" {
        pub(super) fn PyEval_RestoreThread(state: *mut PyThreadState);
    }
}

/// Takes the GIL back when dropped.
struct Detached(*mut ffi::PyThreadState);

impl Drop for Detached {
    fn drop(&mut self) {
        let ended = SleepsForGood;
        // Acquire: pairs with the Release in `end`.
        if ENDED.load(Ordering::Acquire) {
            drop(ended);
            return;
        }
        // SAFETY: PyEval_RestoreThread needs what PyEval_SaveThread returned on this thread, once,
        // and no GIL held. It is declared as what may unwind, which is what `pthread_exit` does.
        unsafe { raw::PyEval_RestoreThread(self.0) };
        std::mem::forget(ended);
    }
}

/// Dropped only when the interpreter has ended, or by the unwinding of a thread that Python ends.
struct SleepsForGood;

impl Drop for SleepsForGood {
    fn drop(&mut self) {
        loop {
            std::thread::park();
        }
    }
}

/// Runs `f` without the GIL; it neither has nor drops objects of Python.
#[inline]
pub(crate) fn detach<T: Send>(_attached: Python<'_>, f: impl FnOnce() -> T + Send) -> T {
    // SAFETY: PyEval_SaveThread needs the GIL, which `_attached` proves. Nobody can use that proof
    // in `f`, as it is not `Send`.
    let detached = Detached(unsafe { ffi::PyEval_SaveThread() });
    let result = f();
    drop(detached);
    result
}

/// Has every session and listener on shared memory closed and every region left when the
/// interpreter has ended: what the kernel does with sockets. Peers read what was sent, and the end
/// of the stream; a process that ends without it looks killed to them.
pub(crate) fn close_all_at_end(_attached: Python<'_>) -> PyResult<()> {
    // SAFETY: Py_AtExit needs the GIL, which `_attached` proves, and a function that does not use
    // Python: `end` does not.
    if unsafe { ffi::Py_AtExit(Some(end)) } == 0 {
        Ok(())
    } else {
        Err(PyRuntimeError::new_err("no room for one more function at the interpreter's end"))
    }
}

/// Called by Python when the interpreter has ended, on the thread that ended it.
extern "C" fn end() {
    // Release: pairs with the Acquire in `Detached::drop`.
    ENDED.store(true, Ordering::Release);
    ivsmc::close_all();
}
