//! The product's rules against a model of the data path: real plans, real steps, and what a packet experiences between
//! any two of them. Neither root nor a kernel is needed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod data_path;
#[path = "../fixtures/mod.rs"]
mod fixtures;
mod histories;
mod judges;
mod moves;
mod truth;
