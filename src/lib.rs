//! MetalEG: pods leave the cluster with the MetalLB address of their Service.

pub mod kernel;
pub mod state;
