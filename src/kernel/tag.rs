//! Comments that identify our rules when they are read back.
//!
//! The kernel and its tools print a rule in other words than it was given, so that its text proves nothing. A
//! comment stays as it is: it carries a hash of what was sent.

/// What every comment of ours begins with.
pub(crate) const TAG: &str = "metaleg:";

/// The comment of a rule that does `text`.
pub(crate) fn tag(name: &str, text: &str) -> String {
    format!("{TAG}{name}:{:08x}", fnv1a(text))
}

/// 32-bit FNV-1a (Fowler, Noll, Vo): stable over releases, unlike the standard library's hashers.
fn fnv1a(text: &str) -> u32 {
    let step = |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    text.bytes().fold(0x811c_9dc5, step)
}
