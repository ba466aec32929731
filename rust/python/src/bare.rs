//! `bare_limit`: what the machine itself allows, for `ivsmc bench`.

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
