//! Mappings, the copy function and the system calls of ivsmc.
//!
//! This crate holds the `unsafe` code of ivsmc: it offers small safe functions, each about one
//! system call wide, and [`mapping::Mapping`], the real [`Memory`](ivsmc_proto::memory::Memory).
//! It decides nothing: no retries, no timeouts, no protocol. Calls that a signal interrupts
//! return [`ErrorKind::Interrupted`](std::io::ErrorKind::Interrupted), so that the caller can
//! look at what the signal meant.
//!
//! Every descriptor made here is close-on-exec, and closed in a forked child
//! ([`fork`] says how) unless it was taken out with [`fd::Fd::into_owned`].
//!
//! | module | holds |
//! | --- | --- |
//! | [`fd`], [`fork`] | owned descriptors; what a forked child gives up |
//! | [`mapping`], [`mem`] | shared memory; uninitialised buffers (the copy function is private) |
//! | [`mmio`], [`vfio`], [`pci`] | device registers; VFIO's calls; PCI devices as sysfs shows them |
//! | [`lock`], [`mod@file`] | byte locks; files, directories, random numbers, memory limits |
//! | [`net`], [`poll`] | sockets, addresses, descriptors over sockets; waiting, eventfds |
//! | [`futex`], [`thread`] | waiting inside the process; threads that take no signals |
//! | [`errno`] | error numbers by name |
//! | `failpoint` | how a test has its process die; with the feature of that name |

#[cfg(not(all(target_os = "linux", target_endian = "little", target_pointer_width = "64")))]
compile_error!("ivsmc needs 64-bit little-endian Linux: region words are little-endian u64");

mod aio;
mod call;
mod copy;
mod pages;

pub mod errno;
#[cfg(feature = "failpoints")]
pub mod failpoint;
pub mod fd;
pub mod file;
pub mod fork;
pub mod futex;
pub mod lock;
pub mod mapping;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod poll;
pub mod thread;
pub mod vfio;
