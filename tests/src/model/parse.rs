//! Parsing of payloads.

/// The NUL-terminated strings of a payload, and the bytes after the last one.
pub(super) fn strings(payload: &[u8]) -> (Vec<&[u8]>, &[u8]) {
    let mut pieces: Vec<&[u8]> = payload.split(|b| *b == 0).collect();
    let rest = pieces.pop().unwrap_or_default();
    (pieces, rest)
}

/// The strings of a payload that is exactly `count` strings.
pub(super) fn exactly(payload: &[u8], count: usize) -> Result<Vec<&[u8]>, &'static str> {
    let (strings, rest) = strings(payload);
    if strings.len() == count && rest.is_empty() { Ok(strings) } else { Err("EINVAL") }
}

pub(super) fn number(text: &[u8], max: u64) -> Result<u64, &'static str> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(text).map_err(|_| "EINVAL")?;
    let number: u64 = if digits { text.parse() } else { "x".parse() }.map_err(|_| "EINVAL")?;
    if number <= max { Ok(number) } else { Err("EINVAL") }
}

pub(super) fn domid(text: &[u8]) -> Result<u16, &'static str> {
    number(text, 65535).map(|number| u16::try_from(number).expect("at most 65535"))
}

/// A well-formed path, not resolved.
pub(super) fn path(text: &[u8]) -> Result<&str, &'static str> {
    let text = std::str::from_utf8(text).map_err(|_| "EINVAL")?;
    let legal = |c: char| c.is_ascii_alphanumeric() || "-/_@".contains(c);
    let bad = text.is_empty()
        || !text.chars().all(legal)
        || text.contains("//")
        || (text.ends_with('/') && text != "/");
    if bad { Err("EINVAL") } else { Ok(text) }
}
