//! `Agent`: the owner of a guest's device, for Python.

use std::path::PathBuf;
use std::sync::Arc;

use ivsmc::agent::{self, AgentOptions};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::detach::detach;
use crate::errors;
use crate::serving::{serve, Open};

/// The owner of an ivshmem device of this virtual machine, for the machine's processes.
#[pyclass(frozen, module = "ivsmc._native")]
pub(crate) struct Agent {
    open: Open<agent::Agent>,
}

impl Agent {
    fn agent(&self) -> PyResult<Arc<agent::Agent>> {
        self.open.get("agent")
    }
}

#[pymethods]
impl Agent {
    #[new]
    #[pyo3(signature = (address = None, *, path = None, mode = 0o600, group = None))]
    fn new(
        py: Python<'_>,
        address: Option<&str>,
        path: Option<PathBuf>,
        mode: u32,
        group: Option<u32>,
    ) -> PyResult<Self> {
        let agent = detach(py, || {
            let defaults = match path {
                Some(path) => AgentOptions::new(path),
                None => AgentOptions::found_by_clients(address)?,
            };
            agent::Agent::new(AgentOptions { mode, group, ..defaults }, address)
        })
        .map_err(|error| errors::to_python(py, error))?;
        Ok(Self { open: Open::new(agent) })
    }

    /// Serve clients for at most ``poll`` seconds, running signal handlers; then return.
    ///
    /// ``log`` is called with one line for each client that joins, leaves, dies or is turned away.
    #[pyo3(signature = (poll, /, log = None))]
    fn serve(&self, py: Python<'_>, poll: f64, log: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let agent = self.agent()?;
        let stop = || agent.handle().stop();
        serve(py, poll, log, stop, |time, gil, on_event| agent.serve_for(time, gil, on_event))
    }

    /// Return path, device, ivposition, region, size, vectors, the clients and how many came and went.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let status = self.agent()?.status().map_err(|error| errors::to_python(py, error))?;
        let clients = PyList::empty(py);
        for client in status.clients {
            let dict = PyDict::new(py);
            dict.set_item("pid", client.who.pid)?;
            dict.set_item("uid", client.who.uid)?;
            dict.set_item("slot", client.slot)?;
            dict.set_item("vector", client.vector)?;
            dict.set_item("shared", client.is_shared)?;
            dict.set_item("age", client.age.as_secs_f64())?;
            clients.append(dict)?;
        }
        let dict = PyDict::new(py);
        dict.set_item("path", status.path)?;
        dict.set_item("device", status.device)?;
        dict.set_item("ivposition", status.ivposition)?;
        dict.set_item("region", crate::device::uuid(status.uuid))?;
        dict.set_item("size", status.size)?;
        dict.set_item("vectors", status.vectors)?;
        dict.set_item("clients", clients)?;
        dict.set_item("joined", status.joined)?;
        dict.set_item("left", status.left)?;
        dict.set_item("died", status.died)?;
        dict.set_item("refused", status.refused)?;
        Ok(dict)
    }

    /// Stop: remove the socket. Clients keep the device. Idempotent.
    fn close(&self, py: Python<'_>) {
        self.open.close(py, |agent| agent.handle().stop());
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.close(py);
    }
}
