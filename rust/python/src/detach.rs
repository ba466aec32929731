//! Going on without the GIL, and never back into an interpreter that is gone.
//!
//! Before Python 3.14 a daemon thread that asks for the GIL while the interpreter ends is ended
//! by `pthread_exit`, which unwinds its stack; Rust code there makes the C library abort the whole
//! process. PyO3's `Python::detach` lets that happen. Here such a thread sleeps until the process
//! has ended, as it does from Python 3.14 on.

use pyo3::ffi;
use pyo3::prelude::*;

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
        // SAFETY: PyEval_RestoreThread needs what PyEval_SaveThread returned on this thread, once,
        // and no GIL held. It is declared as what may unwind, which is what `pthread_exit` does.
        unsafe { raw::PyEval_RestoreThread(self.0) };
        std::mem::forget(ended);
    }
}

/// Dropped only by the unwinding of a thread that Python ends.
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
