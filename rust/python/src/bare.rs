//! For `ivsmc bench` and tests: what the machine itself allows, and other settings in one run.

use std::time::Duration;

use pyo3::prelude::*;

use crate::errors;

/// Measures the limit between two processors: (microseconds of a round trip, bytes per second).
#[pyfunction]
#[pyo3(signature = (cores, round_trips, size, /))]
pub(crate) fn bare_limit(
    py: Python<'_>,
    cores: (usize, usize),
    round_trips: u32,
    size: u64,
) -> PyResult<(f64, f64)> {
    let limit = py
        .detach(|| ivsmc::limit(cores, round_trips, size))
        .map_err(|error| errors::to_python(py, error))?;
    Ok((limit.round_trip.as_secs_f64() * 1e6, limit.bytes_per_second))
}

/// Sets how many microseconds waits look before they sleep; `None` is what the environment says.
#[pyfunction]
#[pyo3(signature = (microseconds, /))]
pub(crate) fn set_spin(microseconds: Option<u64>) {
    ivsmc::set_spin(microseconds.map(Duration::from_micros));
}

/// Sets how many milliseconds connects wait for a listener; `None` is what the environment says.
#[pyfunction]
#[pyo3(signature = (milliseconds, /))]
pub(crate) fn set_match_wait(milliseconds: Option<u64>) {
    ivsmc::set_match_wait(milliseconds.map(Duration::from_millis));
}
