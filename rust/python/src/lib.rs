//! The native module `ivsmc._native`: the runtime's classes for Python, without logic of their own.
//!
//! Waiting and long copies run without the GIL, everything else with it. The only `unsafe` is
//! where Python lends and takes memory (`memory`) and the GIL (`detach`).

use pyo3::prelude::*;

mod acceptor;
mod address;
mod agent;
mod bare;
mod connect;
mod detach;
mod device;
mod errors;
mod gil;
mod memory;
mod server;
mod serving;
mod stream;

/// The classes and functions of the module, all in one place.
#[pymodule(gil_used = true)]
mod _native {
    #[pymodule_export]
    use crate::acceptor::Acceptor;
    #[pymodule_export]
    use crate::agent::Agent;
    #[pymodule_export]
    use crate::bare::{bare_limit, set_match_wait, set_spin};
    #[pymodule_export]
    use crate::connect::connect;
    #[pymodule_export]
    use crate::device::{devices, open_device, shutdown, Device};
    #[pymodule_export]
    use crate::server::Server;
    #[pymodule_export]
    use crate::stream::{Fallback, Handle, Stream};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::detach::close_all_at_end(module.py())
    }
}
