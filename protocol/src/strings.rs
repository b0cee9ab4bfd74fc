//! The text forms in payloads: NUL-terminated strings and decimal numbers.

/// Iterates over the NUL-terminated strings of a payload. Bytes after the last NUL are not a string.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    rest: &'a [u8],
}

impl<'a> Strings<'a> {
    /// An iterator over the strings in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Strings { rest: bytes }
    }

    /// The bytes after the strings that have been returned.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let end = self.rest.iter().position(|&b| b == 0)?;
        let (string, rest) = self.rest.split_at(end);
        self.rest = &rest[1..];
        Some(string)
    }
}

/// Reads a decimal number. Returns `None` unless `text` is one or more digits and the number fits `T`.
///
/// A sign, a blank or a base prefix is refused: `strtoul` of C and `int_of_string` of OCaml disagree
/// on them, and no client sends them.
pub fn decimal<T: TryFrom<u64>>(text: &[u8]) -> Option<T> {
    if text.is_empty() {
        return None;
    }
    let mut number: u64 = 0;
    for byte in text {
        let digit = byte.checked_sub(b'0').filter(|d| *d < 10)?;
        number = number.checked_mul(10)?.checked_add(digit.into())?;
    }
    number.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a text other than digits is accepted, or a number out of range.
    #[test]
    fn decimal_accepts_only_digits_in_range() {
        assert_eq!(decimal::<u16>(b"65535"), Some(65535));
        assert_eq!(decimal::<u16>(b"007"), Some(7));
        for bad in ["", "65536", "-1", "+1", " 1", "1 ", "0x1", "abc", "18446744073709551616"] {
            assert_eq!(decimal::<u16>(bad.as_bytes()), None, "{bad:?}");
        }
    }

    // Fails if the bytes after the last NUL are returned as a string.
    #[test]
    fn strings_end_at_the_last_nul() {
        let mut strings = Strings::new(b"a\0\0rest");
        assert_eq!(strings.next(), Some(&b"a"[..]));
        assert_eq!(strings.next(), Some(&b""[..]));
        assert_eq!(strings.next(), None);
        assert_eq!(strings.rest(), b"rest");
    }
}
