//! How a call of Python waits: without the GIL, with signal handlers run in between.

use std::cell::RefCell;
use std::time::Duration;

use ivsmc::{Error, Host, Result, Timeout};
use ivsmc_shm::thread;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::detach::detach;
use crate::errors;

/// The host of one call: holds what a signal handler raised during it.
pub(crate) struct Gil<'py> {
    py: Python<'py>,
    raised: RefCell<Option<PyErr>>,
}

impl<'py> Gil<'py> {
    pub(crate) fn new(py: Python<'py>) -> Self {
        Self { py, raised: RefCell::new(None) }
    }

    /// The Python exception of `error`.
    pub(crate) fn raise(&self, error: Error) -> PyErr {
        match (error, self.raised.take()) {
            (Error::Interrupted, Some(raised)) => raised,
            (error, _) => errors::to_python(self.py, error),
        }
    }
}

impl Host for Gil<'_> {
    #[inline]
    fn blocking<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        detach(self.py, f)
    }

    fn interrupted(&self) -> Result<()> {
        self.py.check_signals().map_err(|raised| {
            self.raised.replace(Some(raised));
            Error::Interrupted
        })
    }

    fn handles_signals(&self) -> bool {
        thread::is_main()
    }
}

/// A timeout as Python gives it: `None` for ever, 0 not at all, else seconds.
pub(crate) fn timeout(seconds: Option<f64>) -> PyResult<Timeout> {
    match seconds {
        None => Ok(Timeout::Never),
        Some(0.0) => Ok(Timeout::NonBlocking),
        Some(seconds) if seconds < 0.0 || seconds.is_nan() => {
            Err(PyValueError::new_err("Timeout value out of range"))
        }
        Some(seconds) => Ok(Duration::try_from_secs_f64(seconds)
            // Longer than any clock runs.
            .map_or(Timeout::Never, |time| Timeout::After(time.max(Duration::from_nanos(1))))),
    }
}
