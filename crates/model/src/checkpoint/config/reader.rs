//! Checked access to the keys of a JSON object.

use std::path::Path;

use serde_json::{Map, Value};

use crate::Error;

/// Checked access to a JSON object; errors name the file and the key.
pub(super) struct Reader<'a> {
    pub(super) path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

impl Reader<'_> {
    pub(super) fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = match self.map.get(key) {
            None => "nothing".to_owned(),
            Some(value) => value.to_string().chars().take(80).collect(),
        };
        Error::field(self.path, key, expected, found)
    }

    pub(super) fn present(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.wrong(key, "a positive integer"))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.present(key) else { return Ok(None) };
        match value.as_u64() {
            Some(size) if (1..1 << 31).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.wrong(key, "a positive integer below 2^31")),
        }
    }

    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.present(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() => Ok(Some(number)),
                _ => Err(self.wrong(key, "a number")),
            },
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.present(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// An id or a list of ids.
    pub(super) fn ids(&self, key: &str) -> Result<Vec<i64>, Error> {
        let one = |value: &Value| {
            value.as_i64().filter(|id| *id >= 0).ok_or_else(|| self.wrong(key, "token ids"))
        };
        match self.present(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }
}
