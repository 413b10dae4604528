//! MetalEG.
