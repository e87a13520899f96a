//! What numbers among the settings may be: a stage's `Config::check` refuses the rest by name, before anything is begun.

use std::fmt::Display;

use arete_records::Refusal;

/// A count of at least `least`.
///
/// # Errors
///
/// A refused setting.
pub fn at_least<N>(name: &str, value: N, least: u8) -> Result<(), Refusal>
where
    N: PartialOrd + Display + From<u8>,
{
    refused_unless(value >= N::from(least), name, || format!("at least {least}"), value)
}

/// A number above 0.
///
/// # Errors
///
/// A refused setting.
pub fn positive(name: &str, value: f64) -> Result<(), Refusal> {
    let is_good = value.is_finite() && value > 0.0;
    refused_unless(is_good, name, || "a number above 0".to_owned(), value)
}

/// A number of at least 0.
///
/// # Errors
///
/// A refused setting.
pub fn not_negative(name: &str, value: f64) -> Result<(), Refusal> {
    let is_good = value.is_finite() && value >= 0.0;
    refused_unless(is_good, name, || "a number of at least 0".to_owned(), value)
}

/// A part of a whole.
///
/// # Errors
///
/// A refused setting.
pub fn fraction(name: &str, value: f64) -> Result<(), Refusal> {
    let is_good = (0.0..=1.0).contains(&value);
    refused_unless(is_good, name, || "a number within 0 to 1".to_owned(), value)
}

/// Refuses a share that is not above 0 and at most 1.
///
/// # Errors
///
/// [`Refusal`] naming the setting.
pub fn positive_fraction(name: &str, value: f64) -> Result<(), Refusal> {
    let is_good = value > 0.0 && value <= 1.0;
    refused_unless(is_good, name, || "a number above 0, at most 1".to_owned(), value)
}

fn refused_unless(
    is_good: bool,
    name: &str,
    expected: impl FnOnce() -> String,
    got: impl Display,
) -> Result<(), Refusal> {
    if is_good { Ok(()) } else { Err(Refusal::setting(name, expected(), got)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_at_the_edges() {
        assert!(at_least("n", 1_u64, 1).is_ok() && at_least("n", 0_u64, 1).is_err());
        assert!(positive("x", 1e-9).is_ok() && positive("x", 0.0).is_err());
        assert!(not_negative("x", 0.0).is_ok() && not_negative("x", -1e-9).is_err());
        assert!(fraction("x", 0.0).is_ok() && fraction("x", 1.0).is_ok());
        for check in [positive, not_negative, fraction] {
            assert!(check("x", f64::NAN).is_err() && check("x", f64::INFINITY).is_err());
        }
        let error = fraction("warmup_ratio", 2.0).unwrap_err().to_string();
        assert_eq!(error, "warmup_ratio: expected a number within 0 to 1, got 2");
    }
}
