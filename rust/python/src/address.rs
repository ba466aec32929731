//! Socket addresses as Python's tuples.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use pyo3::exceptions::{PyOSError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyTupleMethods};

/// `AF_INET` and `AF_INET6` of Linux.
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;

/// The address family's number.
pub(crate) fn family(address: &SocketAddr) -> i32 {
    match address {
        SocketAddr::V4(_) => AF_INET,
        SocketAddr::V6(_) => AF_INET6,
    }
}

/// `(host, port)` or `(host, port, flowinfo, scope_id)`.
pub(crate) fn to_tuple<'py>(
    py: Python<'py>,
    address: &SocketAddr,
) -> PyResult<Bound<'py, PyTuple>> {
    match address {
        SocketAddr::V4(v4) => (v4.ip().to_string(), v4.port()).into_pyobject(py),
        SocketAddr::V6(v6) => {
            (v6.ip().to_string(), v6.port(), v6.flowinfo(), v6.scope_id()).into_pyobject(py)
        }
    }
}

/// A numeric address; an empty host is the wildcard of `family`.
pub(crate) fn from_tuple(family: i32, tuple: &Bound<'_, PyTuple>) -> PyResult<SocketAddr> {
    if tuple.len() < 2 {
        return Err(PyTypeError::new_err("an address is a tuple of at least (host, port)"));
    }
    let host: String = tuple.get_item(0)?.extract()?;
    let port: u16 = tuple.get_item(1)?.extract()?;
    let host = match (host.as_str(), family) {
        ("", AF_INET6) => "::",
        ("", _) => "0.0.0.0",
        (host, _) => host,
    };
    // A scope in the text stands in the tuple's fourth place too.
    let plain = host.split('%').next().unwrap_or(host);
    let ip: IpAddr = plain.parse().map_err(|_| {
        PyOSError::new_err(format!("not a numeric address: {host:?}; resolve the name first"))
    })?;
    Ok(match ip {
        IpAddr::V4(_) => SocketAddr::new(ip, port),
        IpAddr::V6(v6) => {
            let number = |index: usize| -> PyResult<u32> {
                if tuple.len() > index {
                    tuple.get_item(index)?.extract()
                } else {
                    Ok(0)
                }
            };
            SocketAddr::V6(SocketAddrV6::new(v6, port, number(2)?, number(3)?))
        }
    })
}
