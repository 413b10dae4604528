//! What the program does beside running the agent: commands for the operator.

pub mod cleanup;
pub mod plan;
