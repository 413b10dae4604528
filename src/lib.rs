//! MetalEG: pods leave the cluster with the MetalLB address of their Service.

pub mod agent;
pub mod diff;
pub mod kernel;
pub mod plan;
pub mod report;
pub mod settings;
pub mod state;
pub mod view;
