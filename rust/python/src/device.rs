//! Devices for Python: what is found, and one held open.

use ivsmc::{DeviceInfo, MemoryType, RegionInfo, SlotReport};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::detach::detach;
use crate::errors;

/// The devices that connections use by default, one dict each.
#[pyfunction]
pub(crate) fn devices(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let found = detach(py, ivsmc::devices).map_err(|error| errors::to_python(py, error))?;
    let list = PyList::empty(py);
    for info in found {
        list.append(describe(py, info)?)?;
    }
    Ok(list)
}

fn describe(py: Python<'_>, info: DeviceInfo) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("spec", info.spec)?;
    dict.set_item("kind", info.kind.name())?;
    dict.set_item("usable", info.problem.is_none())?;
    dict.set_item("reason", info.problem)?;
    if let Some(region) = info.region {
        dict.set_item("region", uuid(region.uuid))?;
        dict.set_item("size", region.size)?;
        describe_memory(&dict, region.memory_type)?;
        dict.set_item("slot", &region.slot)?;
        dict.set_item("peers", region.census.live.saturating_sub(1))?;
    }
    Ok(dict)
}

/// What a guest's device's memory was measured to be.
fn describe_memory(dict: &Bound<'_, PyDict>, found: Option<MemoryType>) -> PyResult<()> {
    dict.set_item("memory", found.as_ref().map(MemoryType::name))?;
    dict.set_item("memory_ratio", found.map(|found| found.ratio))
}

fn describe_slot<'py>(py: Python<'py>, slot: SlotReport) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("slot", slot.name())?;
    dict.set_item("index", slot.index)?;
    dict.set_item("generation", slot.generation)?;
    dict.set_item("state", if slot.is_live { "live" } else { "dead" })?;
    dict.set_item("own", slot.is_own)?;
    dict.set_item("prover", slot.prover)?;
    dict.set_item("prover_id", slot.prover_id)?;
    dict.set_item("ivposition", slot.ivposition)?;
    dict.set_item("vector", slot.vector)?;
    dict.set_item("same_boot", slot.is_same_boot)?;
    dict.set_item("same_machine", slot.is_same_machine)?;
    let addresses: Vec<_> = slot.addresses.iter().map(ToString::to_string).collect();
    dict.set_item("addresses", addresses)?;
    Ok(dict)
}

/// A uuid in its usual form.
pub(crate) fn uuid(value: u128) -> String {
    let hex = format!("{value:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Attaches to the device `spec` now, rather than at the first connect or listen.
#[pyfunction]
#[pyo3(signature = (spec, /))]
pub(crate) fn open_device(py: Python<'_>, spec: &str) -> PyResult<Device> {
    let device =
        detach(py, || ivsmc::open_device(spec)).map_err(|error| errors::to_python(py, error))?;
    Ok(Device { device })
}

/// Leaves every region, if nothing is open.
#[pyfunction]
pub(crate) fn shutdown(py: Python<'_>) -> bool {
    detach(py, ivsmc::release_unused)
}

/// One device this process is attached to.
#[pyclass(frozen, module = "ivsmc._native")]
pub(crate) struct Device {
    device: ivsmc::Device,
}

impl Device {
    fn region(&self, py: Python<'_>) -> PyResult<RegionInfo> {
        detach(py, || self.device.region()).map_err(|error| errors::to_python(py, error))
    }
}

#[pymethods]
impl Device {
    /// The spec, as given to ``open_device``.
    #[getter]
    fn spec(&self) -> &str {
        self.device.spec()
    }

    /// ``vfio``, ``host``, ``pci``, ``local`` or ``file``.
    #[getter]
    fn kind(&self) -> &'static str {
        self.device.kind().name()
    }

    /// Return counters of this process's attachment.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let region = self.region(py)?;
        let dict = PyDict::new(py);
        dict.set_item("region", uuid(region.uuid))?;
        dict.set_item("size", region.size)?;
        describe_memory(&dict, region.memory_type)?;
        dict.set_item("slot", region.slot)?;
        dict.set_item("slots", region.slots)?;
        dict.set_item("extent_size", region.extent_size)?;
        dict.set_item("extents_total", region.extents)?;
        dict.set_item("extents", region.own.extents)?;
        dict.set_item("dmbs", region.own.dmbs)?;
        dict.set_item("limbo", region.own.limbo)?;
        let doorbell = region.doorbell;
        dict.set_item("vector", doorbell.map(|doorbell| doorbell.vector))?;
        let doorbell = doorbell.unwrap_or_default();
        dict.set_item("doorbells_received", doorbell.received)?;
        dict.set_item("doorbells_lost", doorbell.lost)?;
        dict.set_item("departures", doorbell.departures)?;
        Ok(dict)
    }

    /// Return what is in use in the region: slots, listeners, intents, extents, DMBs.
    fn census<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let census = self.region(py)?.census;
        let dict = PyDict::new(py);
        dict.set_item("live", census.live)?;
        dict.set_item("dead", census.dead)?;
        dict.set_item("listeners", census.listeners)?;
        dict.set_item("intents", census.intents)?;
        dict.set_item("extents", census.extents)?;
        dict.set_item("dmbs_held", census.dmbs_held)?;
        dict.set_item("dmbs_attached", census.dmbs_attached)?;
        Ok(dict)
    }

    /// Look for dead peers now, take back what they had; return how many there were.
    fn reap(&self, py: Python<'_>) -> PyResult<usize> {
        detach(py, || self.device.reap()).map_err(|error| errors::to_python(py, error))
    }

    /// Return the peer slots that are in use, one dict each.
    fn slots<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let found = detach(py, || self.device.slots());
        let list = PyList::empty(py);
        for slot in found.map_err(|error| errors::to_python(py, error))? {
            list.append(describe_slot(py, slot)?)?;
        }
        Ok(list)
    }

    /// Declare a slot dead and take back what its owner had; return whether it was in use.
    #[pyo3(signature = (slot, /))]
    fn declare_dead(&self, py: Python<'_>, slot: &str) -> PyResult<bool> {
        detach(py, || self.device.declare_dead(slot)).map_err(|error| errors::to_python(py, error))
    }

    /// Let go of the device; the attachment ends with its last session. Idempotent.
    fn close(&self, py: Python<'_>) {
        detach(py, || self.device.close());
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.close(py);
    }
}
