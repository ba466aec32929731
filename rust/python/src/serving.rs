//! Serving for a while, as an ivshmem server or an agent does.

use std::fmt::Display;
use std::time::Duration;

use ivsmc::Timeout;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::gil::Gil;

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
