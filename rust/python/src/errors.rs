//! The one table from the runtime's errors to Python's exceptions.

use ivsmc::Error;
use pyo3::exceptions::{PyOSError, PyTimeoutError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// The exception for `error`: built-in where sockets know it, else of `ivsmc.exceptions`.
pub(crate) fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let text = error.to_string();
    match &error {
        Error::TimedOut => PyTimeoutError::new_err(("timed out",)),
        Error::PeerMisbehaved(_) => own(py, "PeerMisbehaved", error.errno(), text),
        Error::Required(_) => own(py, "SMCRequired", None, text),
        Error::Device { .. } => own(py, "DeviceError", None, text),
        Error::Region { .. } => own(py, "RegionError", None, text),
        Error::Forked => own(py, "ForkedSession", None, text),
        Error::ApiMisuse(_) => PyOSError::new_err((error.errno(), text)),
        _ => match error.errno() {
            // OSError picks its subclass by the number; the words are the system's, as in socket.
            Some(errno) => PyOSError::new_err((errno, system_text(errno))),
            None => PyOSError::new_err(text),
        },
    }
}

fn system_text(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

fn own(py: Python<'_>, name: &str, errno: Option<i32>, text: String) -> PyErr {
    let class = match exceptions(py).and_then(|module| module.getattr(py, name)) {
        Ok(class) => class,
        Err(error) => return error,
    };
    match class.bind(py).cast::<PyType>() {
        Ok(class) => match errno {
            Some(errno) => PyErr::from_type(class.clone(), (errno, text)),
            None => PyErr::from_type(class.clone(), text),
        },
        Err(error) => error.into(),
    }
}

fn exceptions(py: Python<'_>) -> PyResult<&Py<PyModule>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    MODULE.get_or_try_init(py, || Ok(py.import("ivsmc.exceptions")?.unbind()))
}
