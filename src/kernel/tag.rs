//! Comments that identify our rules when they are read back.
//!
//! The kernel and its tools print a rule in other words than it was given, so that its text proves nothing. A
//! comment stays as it is: it carries a hash of what was sent.

/// What every comment of ours begins with.
pub(crate) const TAG: &str = "metaleg:";

/// A rule of ours, without its comment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Its comment, by which it is recognised when it is read back.
    pub(crate) tag: String,
    pub(crate) text: String,
}

impl Rule {
    pub(crate) fn new(name: &str, text: String) -> Rule {
        let tag = format!("{TAG}{name}:{:08x}", fnv1a(&text));
        Rule { tag, text }
    }
}

/// Rules as `name => text`, both of which may name variables in braces. Where it is used, [`Rule`] is in scope.
macro_rules! rules {
    ($($name:literal => $text:literal),* $(,)?) => {
        vec![$(Rule::new(&format!($name), format!($text))),*]
    };
}
pub(crate) use rules;

/// 32-bit FNV-1a (Fowler, Noll, Vo): stable over releases, unlike the standard library's hashers.
fn fnv1a(text: &str) -> u32 {
    let step = |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    text.bytes().fold(0x811c_9dc5, step)
}
