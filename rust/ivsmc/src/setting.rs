//! Numbers that the environment chooses, looked at once in the life of a process.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

use crate::Error;

/// A number with a variable of the environment; a measurement may set another meanwhile.
pub(crate) struct Setting {
    variable: &'static str,
    least: u64,
    /// What to give, for who gave something else.
    wanted: &'static str,
    /// What the variable said when it was first looked at; `None` if it said nothing.
    chosen: OnceLock<Result<Option<u64>, String>>,
    /// [`UNSET`] until somebody asks.
    now: AtomicU64,
}

const UNSET: u64 = u64::MAX;

impl Setting {
    /// Of `variable`, where at least `least` makes sense; `wanted` says so in words.
    pub(crate) const fn new(variable: &'static str, least: u64, wanted: &'static str) -> Self {
        let now = AtomicU64::new(UNSET);
        Self { variable, least, wanted, chosen: OnceLock::new(), now }
    }

    /// Refuses an environment that asks for nonsense.
    ///
    /// # Errors
    /// `ApiMisuse`, in words.
    pub(crate) fn judge(&self) -> crate::Result<()> {
        self.chosen().as_ref().map(|_| ()).map_err(|wrong| Error::ApiMisuse(wrong.clone()))
    }

    /// The number; where nobody chose one, that of `otherwise`.
    #[inline]
    pub(crate) fn get(&self, otherwise: impl FnOnce() -> u64) -> u64 {
        let now = self.now.load(Ordering::Relaxed); // Relaxed: a number by itself
        if now != UNSET {
            return now;
        }
        let number = self.configured(otherwise);
        // Not over what `set` has put there meanwhile.
        let _ = self.now.compare_exchange(UNSET, number, Ordering::Relaxed, Ordering::Relaxed);
        number
    }

    /// Sets the number from now on; `None` is what the environment says, else `otherwise`.
    pub(crate) fn set(&self, number: Option<u64>, otherwise: impl FnOnce() -> u64) {
        let number = number.map_or_else(|| self.configured(otherwise), within);
        self.now.store(number, Ordering::Relaxed); // Relaxed: as above
    }

    fn configured(&self, otherwise: impl FnOnce() -> u64) -> u64 {
        match self.chosen() {
            Ok(Some(number)) => *number,
            _ => within(otherwise()),
        }
    }

    fn chosen(&self) -> &Result<Option<u64>, String> {
        self.chosen.get_or_init(|| self.parse(&std::env::var_os(self.variable).unwrap_or_default()))
    }

    fn parse(&self, text: &OsStr) -> Result<Option<u64>, String> {
        if text.is_empty() {
            return Ok(None);
        }
        let number = text.to_str().and_then(|text| text.trim().parse().ok());
        match number {
            Some(number) if number >= self.least => Ok(Some(within(number))),
            other => {
                let wrong = if other.is_some() { "too small" } else { "no number" };
                let (variable, text, wanted) = (self.variable, text.to_string_lossy(), self.wanted);
                Err(format!("{variable}={text} is {wrong}; give {wanted}, or unset it"))
            }
        }
    }
}

fn within(number: u64) -> u64 {
    number.min(UNSET - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_a_whole_number_or_refused() {
        let setting = Setting::new("IVSMC_NUMBER", 1, "whole numbers from 1");
        let parse = |text| setting.parse(OsStr::new(text));
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("1"), Ok(Some(1)));
        assert_eq!(parse(" 200 "), Ok(Some(200)));
        assert_eq!(parse("18446744073709551615"), Ok(Some(UNSET - 1)));
        for (text, wrong) in
            [("-1", "no number"), ("1.5", "no number"), ("50us", "no number"), ("0", "too small")]
        {
            let said = parse(text).expect_err(text);
            let cure = "give whole numbers from 1, or unset it";
            assert_eq!(said, format!("IVSMC_NUMBER={text} is {wrong}; {cure}"));
        }
    }

    #[test]
    fn what_was_set_is_there_until_it_is_taken_back() {
        let setting = Setting::new("IVSMC_THAT_NOBODY_SETS", 0, "a number");
        setting.judge().unwrap();
        assert_eq!(setting.get(|| 7), 7);
        setting.set(Some(9), || 7);
        assert_eq!(setting.get(|| 7), 9);
        setting.set(None, || 7);
        assert_eq!(setting.get(|| 8), 7);
    }
}
