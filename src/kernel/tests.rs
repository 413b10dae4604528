//! The shape of this folder.
