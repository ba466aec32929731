//! `connect`: one numeric address.

use ivsmc::{ConnectOptions, Require};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::address;
use crate::gil::{timeout, Gil};
use crate::stream::Handle;

/// Connects to one numeric address: TCP, then the handshake, or plain TCP.
#[pyfunction]
#[pyo3(signature = (family, address, timeout, source, device, require, buffer))]
#[allow(clippy::too_many_arguments, reason = "the private function behind a keyword API")]
pub(crate) fn connect(
    py: Python<'_>,
    family: i32,
    address: &Bound<'_, PyTuple>,
    timeout: Option<f64>,
    source: Option<&Bound<'_, PyTuple>>,
    device: Option<String>,
    require: Option<&str>,
    buffer: Option<i64>,
) -> PyResult<Handle> {
    let address = address::from_tuple(family, address)?;
    let options = ConnectOptions {
        timeout: self::timeout(timeout)?,
        source: source.map(|source| address::from_tuple(family, source)).transpose()?,
        device,
        require: self::require(require)?,
        buffer: self::buffer(buffer)?,
        eid: None,
    };
    let gil = Gil::new(py);
    let session = ivsmc::connect(address, &options, &gil).map_err(|error| gil.raise(error))?;
    Ok(Handle::new(session, address::family(&address)))
}

/// `None`, or `"smc"` for no fallback.
pub(crate) fn require(require: Option<&str>) -> PyResult<Require> {
    match require {
        None => Ok(Require::Any),
        Some("smc") => Ok(Require::Smc),
        Some(other) => {
            Err(PyValueError::new_err(format!("require must be None or \"smc\", not {other:?}")))
        }
    }
}

/// Bytes of the receive ring, at least 1; more than there is gives the largest.
pub(crate) fn buffer(buffer: Option<i64>) -> PyResult<Option<u32>> {
    match buffer {
        Some(bytes) if bytes < 1 => {
            Err(PyValueError::new_err(format!("buffer must be at least 1 byte, not {bytes}")))
        }
        Some(bytes) => Ok(Some(u32::try_from(bytes).unwrap_or(u32::MAX))),
        None => Ok(None),
    }
}
