//! What the classes of an ivshmem server and of an agent share: being open, and serving for a while.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ivsmc::Timeout;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::detach::detach;
use crate::gil::Gil;

/// An ivshmem server or an agent until it is closed; a thread that serves holds a clone.
pub(crate) struct Open<T>(Mutex<Option<Arc<T>>>);

impl<T: Send + Sync> Open<T> {
    pub(crate) fn new(daemon: T) -> Self {
        Self(Mutex::new(Some(Arc::new(daemon))))
    }

    /// What is open; "the `name` is closed" raised if nothing is.
    pub(crate) fn get(&self, name: &str) -> PyResult<Arc<T>> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(|| PyValueError::new_err(format!("the {name} is closed")))
    }

    /// Closes it, having it stopped by `stop` where it is being served.
    pub(crate) fn close(&self, py: Python<'_>, stop: impl FnOnce(&T)) {
        let daemon = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(daemon) = daemon {
            stop(&daemon);
            detach(py, || drop(daemon));
        }
    }
}

/// Runs `serve` for at most `poll` seconds, running signal handlers, and tells `log` each event in words.
/// What `log` raises ends it, by `stop`.
pub(crate) fn serve<E: Display>(
    py: Python<'_>,
    poll: f64,
    log: Option<&Bound<'_, PyAny>>,
    stop: impl Fn(),
    serve: impl FnOnce(Timeout, &Gil<'_>, &mut dyn FnMut(E)) -> ivsmc::Result<()>,
) -> PyResult<()> {
    let gil = Gil::new(py);
    let time = Duration::try_from_secs_f64(poll)
        .map_err(|_| PyValueError::new_err("poll is a number of seconds, not negative"))?;
    let mut failed = None;
    let served = serve(Timeout::After(time), &gil, &mut |event| {
        if let (Some(log), None) = (log, &failed) {
            failed = log.call1((event.to_string(),)).err();
            if failed.is_some() {
                // It may be what a signal handler raised.
                stop();
            }
        }
    });
    match (failed, served) {
        (Some(raised), _) => Err(raised),
        (None, served) => served.map_err(|error| gil.raise(error)),
    }
}
