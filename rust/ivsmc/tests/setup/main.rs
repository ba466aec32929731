//! Setting sessions up: with peers that keep the rules, that know nothing of them, and that break
//! them at every step.

mod broken;
mod peers;
mod plain;
mod shared;
