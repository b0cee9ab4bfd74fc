//! Values and permissions as text.

use xenstore_client::Perm;

/// Escapes control characters, bytes that are not UTF-8, and the backslash, as `\xHH`, `\n` and `\\`.
pub(crate) fn escape(value: &[u8]) -> String {
    let mut text = String::new();
    for chunk in value.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                c if c.is_control() => {
                    for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                        text.push_str(&format!("\\x{byte:02x}"));
                    }
                }
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Reverses [`escape`]. Returns `None` if the text contains another escape sequence.
pub(crate) fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut value = Vec::new();
    let mut rest = text;
    while let Some((plain, escaped)) = rest.split_once('\\') {
        value.extend_from_slice(plain.as_bytes());
        let (byte, after) = match escaped.as_bytes().first()? {
            b'\\' => (b'\\', &escaped[1..]),
            b'n' => (b'\n', &escaped[1..]),
            b'x' => {
                let digits = escaped.get(1..3).filter(|digits| !digits.starts_with('+'))?;
                (u8::from_str_radix(digits, 16).ok()?, &escaped[3..])
            }
            _ => return None,
        };
        value.push(byte);
        rest = after;
    }
    value.extend_from_slice(rest.as_bytes());
    Some(value)
}

/// Formats a permission list in the form of SET_PERMS: `n0 r5`.
pub(crate) fn perms(perms: &[Perm]) -> String {
    perms.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a byte changes between escape and unescape, or a control character is printed.
    #[test]
    fn escaped_bytes_are_printable_and_unescape_to_themselves() {
        let all: Vec<u8> = (0..=255).collect();
        let text = escape(&all);
        assert!(!text.chars().any(char::is_control));
        assert_eq!(unescape(&text), Some(all));
        assert_eq!(escape("ümlaut\n\\".as_bytes()), "ümlaut\\n\\\\");
        // A control character of two bytes.
        assert_eq!(escape("\u{85}".as_bytes()), "\\xc2\\x85");
        assert_eq!(unescape("\\xc2\\x85").as_deref(), Some("\u{85}".as_bytes()));
        assert_eq!(unescape("\\x+1"), None);
        assert_eq!(unescape("\\q"), None);
        assert_eq!(unescape("\\x4"), None);
    }
}
