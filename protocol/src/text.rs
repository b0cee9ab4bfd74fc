//! The two textual forms inside payloads: NUL-terminated strings and decimal numbers.

/// The NUL-terminated strings at the start of a payload; what follows the last NUL is not a string.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    rest: &'a [u8],
}

impl<'a> Strings<'a> {
    /// Reads strings from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Strings { rest: bytes }
    }

    /// What has not been read as a string yet.
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

/// A decimal number: digits only, at least one, and it fits. No sign, no blank, no base prefix:
/// C's `strtoul` and OCaml's `int_of_string` disagree on those, and no client sends them.
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

    // Fails if anything but plain digits in range is taken for a number.
    #[test]
    fn decimal_is_strict() {
        assert_eq!(decimal::<u16>(b"65535"), Some(65535));
        assert_eq!(decimal::<u16>(b"007"), Some(7));
        for bad in ["", "65536", "-1", "+1", " 1", "1 ", "0x1", "abc", "18446744073709551616"] {
            assert_eq!(decimal::<u16>(bad.as_bytes()), None, "{bad:?}");
        }
    }

    // Fails if the bytes behind the last NUL are taken for a string.
    #[test]
    fn strings_end_at_the_last_nul() {
        let mut strings = Strings::new(b"a\0\0rest");
        assert_eq!(strings.next(), Some(&b"a"[..]));
        assert_eq!(strings.next(), Some(&b""[..]));
        assert_eq!(strings.next(), None);
        assert_eq!(strings.rest(), b"rest");
    }
}
