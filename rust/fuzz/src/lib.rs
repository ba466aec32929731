//! What the fuzz targets of `fuzz_targets/` share.
//!
//! A target reads what the other end does from the bytes of one input ([`Input`]), does that to the real
//! code, and panics where a promise is broken. `./run` builds and runs all of them; `cargo fuzz run TARGET`
//! does one (see `README.md`).

mod input;
pub mod scribble;
mod things;
pub mod wire;

pub use input::Input;
pub use things::{memory, Scratch};
