//! Paths: their syntax, and the nodes that they name.

use alloc::borrow::Cow;
use alloc::format;
use core::fmt;

use crate::ids::DomId;
use crate::limits::ABS_PATH_MAX;
use crate::strings::decimal;

/// A path as a client writes it: absolute, relative to the client's `/local/domain/N/`, or the name
/// of a special node. It has only legal characters and no empty component.
///
/// ```
/// use xenstore_protocol::{DomId, Path};
///
/// let path = Path::parse(b"device/vif").expect("a valid path");
/// let node = path.resolve(DomId(5)).expect("within 3,072 bytes");
/// assert_eq!(node.as_str(), "/local/domain/5/device/vif");
/// assert_eq!(Path::parse(b"/a//b"), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path<'a>(&'a str);

/// The kinds of [`Path`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// Starts with `/`.
    Absolute,
    /// Starts with `@`: `@introduceDomain`, `@releaseDomain` and names derived from them.
    Special,
    /// Anything else.
    Relative,
}

/// The characters that a path may have.
const LEGAL: [bool; 256] = {
    let (mut legal, mut byte) = ([false; 256], 0_u8);
    while byte < 128 {
        legal[byte as usize] =
            byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'/' | b'_' | b'@');
        byte += 1;
    }
    legal
};

impl<'a> Path<'a> {
    /// Reads a path. Returns `None` if it is malformed.
    pub fn parse(bytes: &'a [u8]) -> Option<Path<'a>> {
        // One pass over the bytes: most requests have a path.
        let (mut last, mut valid) = (0, !bytes.is_empty());
        for &byte in bytes {
            valid &= LEGAL[usize::from(byte)] && (byte, last) != (b'/', b'/');
            last = byte;
        }
        if !valid || (last == b'/' && bytes.len() > 1) {
            return None;
        }
        core::str::from_utf8(bytes).ok().map(Path)
    }

    /// The text.
    pub fn as_str(self) -> &'a str {
        self.0
    }

    /// The kind of the path.
    pub fn kind(self) -> PathKind {
        match self.0.as_bytes()[0] {
            b'/' => PathKind::Absolute,
            b'@' => PathKind::Special,
            _ => PathKind::Relative,
        }
    }

    /// The path of the node for a client of domain `domid`. Returns `None` if it is longer than
    /// [`ABS_PATH_MAX`]. A special path is returned unchanged.
    pub fn resolve(self, domid: DomId) -> Option<AbsPath<'a>> {
        let text = match self.kind() {
            PathKind::Relative => Cow::Owned(format!("/local/domain/{domid}/{}", self.0)),
            PathKind::Absolute | PathKind::Special => Cow::Borrowed(self.0),
        };
        (text.len() <= ABS_PATH_MAX).then_some(AbsPath(text))
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// A resolved path: `/`, `/a/b`, or the name of a special node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AbsPath<'a>(Cow<'a, str>);

impl<'a> AbsPath<'a> {
    /// Reads an absolute or special path. Returns `None` if it is relative, malformed or longer than
    /// [`ABS_PATH_MAX`].
    pub fn parse(bytes: &'a [u8]) -> Option<AbsPath<'a>> {
        let path = Path::parse(bytes)?;
        (path.kind() != PathKind::Relative).then(|| path.resolve(DomId::DOM0)).flatten()
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns true if it is the name of a special node.
    pub fn is_special(&self) -> bool {
        self.0.starts_with('@')
    }

    /// Returns true if it is `/`.
    pub fn is_root(&self) -> bool {
        self.0 == "/"
    }

    /// The names of the nodes from the root down; none for `/`.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').filter(|name| !name.is_empty())
    }

    /// The text, borrowed if the path is.
    pub fn into_inner(self) -> Cow<'a, str> {
        self.0
    }

    /// The same path with an owned text.
    pub fn into_owned(self) -> AbsPath<'static> {
        AbsPath(Cow::Owned(self.0.into_owned()))
    }
}

impl fmt::Display for AbsPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns the length of a leading `/local/domain/N/`, or 0 if there is none. The prefix does not
/// count against a domain's path limit: its paths remain valid when a migration changes its domid
/// (XSA-323).
pub fn domain_prefix_len(path: &str) -> usize {
    const BASE: &str = "/local/domain/";
    let Some(rest) = path.strip_prefix(BASE) else { return 0 };
    match rest.split_once('/') {
        // As in C xenstored, which reads at most five digits.
        Some((domid, _)) if domid.len() <= 5 && decimal::<u16>(domid.as_bytes()).is_some() => {
            BASE.len() + domid.len() + 1
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;

    // Fails if a path with an illegal character, an empty component or a trailing slash is accepted
    // (XSA-481: no malformed variant of /local/domain/N/x may be accepted in part).
    #[test]
    fn malformed_path_is_refused() {
        for good in ["/", "/a", "a", "/a-b_c@d/E9", "@x", "local/domain", "/local/domain/5"] {
            assert!(Path::parse(good.as_bytes()).is_some(), "{good:?}");
        }
        for bad in [
            "",
            "//",
            "/a/",
            "a/",
            "/a//b",
            "/a.b",
            "/a:b",
            "/a b",
            "/\u{e9}",
            "/local/domain/",
            "/local/domain/5/",
            "/local/domain//x",
            "a\0b",
            "/a\n",
        ] {
            assert!(Path::parse(bad.as_bytes()).is_none(), "{bad:?}");
        }
    }

    // Fails if a relative path is resolved for another domain, or the limit is off by one.
    #[test]
    fn relative_path_gets_the_prefix_of_the_domain() {
        let resolve = |p: &str, d| {
            Path::parse(p.as_bytes()).unwrap().resolve(DomId(d)).map(|p| String::from(p.as_str()))
        };
        assert_eq!(resolve("data/x", 7).as_deref(), Some("/local/domain/7/data/x"));
        assert_eq!(resolve("/a", 7).as_deref(), Some("/a"));
        assert_eq!(resolve("@releaseDomain", 7).as_deref(), Some("@releaseDomain"));
        let longest = String::from("/") + &"a".repeat(ABS_PATH_MAX - 1);
        assert!(resolve(&longest, 0).is_some());
        assert_eq!(resolve(&(longest.clone() + "a"), 0), None);
        assert_eq!(resolve(&longest[1..], 0), None);
    }

    // Fails if the prefix that a limit does not count is measured wrongly (XSA-323).
    #[test]
    fn domain_prefix_has_a_domid_of_at_most_five_digits() {
        assert_eq!(domain_prefix_len("/local/domain/12/data"), 17);
        for none in [
            "/local/domain/12",
            "/local/domain/000005/y",
            "/local/domain/x/y",
            "/local/domain//y",
            "/tool/x",
            "/",
        ] {
            assert_eq!(domain_prefix_len(none), 0, "{none}");
        }
    }
}
