//! `Server`: the ivshmem server for Python.

use std::path::PathBuf;
use std::sync::Arc;

use ivsmc::server::{self, Backing, Holder, ServerOptions};
use ivsmc::Error;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::detach::detach;
use crate::errors;
use crate::serving::{serve, Open};

/// An ivshmem server, speaking QEMU's protocol on the Unix socket `path`.
#[pyclass(frozen, module = "ivsmc._native")]
pub(crate) struct Server {
    open: Open<server::Server>,
}

impl Server {
    fn server(&self) -> PyResult<Arc<server::Server>> {
        self.open.get("ivshmem server")
    }
}

#[pymethods]
impl Server {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "a keyword API")]
    #[pyo3(
        signature = (path, *, size, vectors, file = None, mode = 0o600, group = None, state = false)
    )]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        size: u64,
        vectors: u16,
        file: Option<PathBuf>,
        mode: u32,
        group: Option<u32>,
        state: bool,
    ) -> PyResult<Self> {
        let backing = match file {
            None => Backing::Memfd { size },
            Some(path) => Backing::File { path, size: Some(size) },
        };
        let options = ServerOptions { mode, group, backing, vectors, ..ServerOptions::new(path) };
        let server = detach(py, || match state.then(Holder::from_environment).transpose()? {
            None => server::Server::new(options),
            Some(Some(holder)) => server::Server::held_by(options, holder),
            Some(None) => Err(Error::ApiMisuse("nobody keeps its state: no NOTIFY_SOCKET".into())),
        })
        .map_err(|error| errors::to_python(py, error))?;
        Ok(Self { open: Open::new(server) })
    }

    /// Serve clients for at most ``poll`` seconds, running signal handlers; then return.
    ///
    /// ``log`` is called with one line for each client that joins, leaves or is turned away.
    #[pyo3(signature = (poll, /, log = None))]
    fn serve(&self, py: Python<'_>, poll: f64, log: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let server = self.server()?;
        let stop = || server.handle().stop();
        serve(py, poll, log, stop, |time, gil, on_event| server.serve_for(time, gil, on_event))
    }

    /// Return path, region, size, vectors, the clients and how many came and went.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let status = self.server()?.status().map_err(|error| errors::to_python(py, error))?;
        let clients = PyList::empty(py);
        for client in status.clients {
            let dict = PyDict::new(py);
            dict.set_item("id", client.id)?;
            dict.set_item("pid", client.pid)?;
            dict.set_item("uid", client.uid)?;
            dict.set_item("age", client.age.as_secs_f64())?;
            dict.set_item("behind", client.behind)?;
            clients.append(dict)?;
        }
        let dict = PyDict::new(py);
        dict.set_item("path", status.path)?;
        dict.set_item("file", status.file)?;
        dict.set_item("region", crate::device::uuid(status.uuid))?;
        dict.set_item("size", status.size)?;
        dict.set_item("vectors", status.vectors)?;
        dict.set_item("clients", clients)?;
        dict.set_item("joined", status.joined)?;
        dict.set_item("left", status.left)?;
        dict.set_item("refused", status.refused)?;
        Ok(dict)
    }

    /// Stop: drop the clients and remove the socket. Idempotent.
    ///
    /// If ``keep`` and somebody keeps its state, leave both to the next one instead.
    #[pyo3(signature = (*, keep = false))]
    fn close(&self, py: Python<'_>, keep: bool) {
        self.open.close(py, |server| {
            server.handle().stop();
            if keep {
                server.leave_to_holder();
            }
        });
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.close(py, false);
    }
}
