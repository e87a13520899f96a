//! The key–value metadata of a GGUF file, with typed access.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::Error;

/// A metadata value, widened to the largest type of its sort.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(Vec<Value>),
}

/// Metadata by key; errors name the file and the key.
#[derive(Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: HashMap<String, Value>,
}

impl Metadata {
    pub(crate) fn new(path: &Path, entries: HashMap<String, Value>) -> Self {
        Self { path: path.to_path_buf(), entries }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value, if the key is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = match self.entries.get(key) {
            None => "nothing".to_owned(),
            Some(value) => format!("{value:?}").chars().take(80).collect(),
        };
        Error::field(&self.path, key, expected, found)
    }

    /// A text.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is missing or no text.
    pub fn string(&self, key: &str) -> Result<&str, Error> {
        self.optional_string(key)?.ok_or_else(|| self.wrong(key, "a string"))
    }

    /// A text, if the key is there.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is no text.
    pub fn optional_string(&self, key: &str) -> Result<Option<&str>, Error> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// A positive size or an id.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is missing, negative or no integer.
    pub fn size(&self, key: &str) -> Result<usize, Error> {
        match self.optional_size(key)? {
            Some(size) if size > 0 => Ok(size),
            _ => Err(self.wrong(key, "a positive integer")),
        }
    }

    /// A size or an id, if the key is there.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is negative or no integer.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let size = match self.entries.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(value)) => usize::try_from(*value).ok(),
            Some(Value::Signed(value)) => usize::try_from(*value).ok(),
            Some(_) => None,
        };
        match size {
            Some(size) if size < 1 << 40 => Ok(Some(size)),
            _ => Err(self.wrong(key, "an integer from 0 to 2^40")),
        }
    }

    /// A number.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is missing or no finite number.
    pub fn number(&self, key: &str) -> Result<f64, Error> {
        self.optional_number(key)?.ok_or_else(|| self.wrong(key, "a number"))
    }

    /// A number, if the key is there.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is no finite number.
    pub fn optional_number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(Value::Unsigned(value)) => Ok(Some(*value as f64)),
            Some(Value::Signed(value)) => Ok(Some(*value as f64)),
            Some(_) => Err(self.wrong(key, "a finite number")),
        }
    }

    /// A truth value, if the key is there.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is none.
    pub fn optional_flag(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A list of texts, if the key is there.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is no such list.
    pub fn optional_strings(&self, key: &str) -> Result<Option<Vec<String>>, Error> {
        self.list(key, "a list of strings", |value| match value {
            Value::String(text) => Some(text.clone()),
            _ => None,
        })
    }

    /// A list of numbers, if the key is there.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if it is no such list.
    pub fn optional_numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        self.list(key, "a list of numbers", |value| match value {
            Value::Float(number) => Some(*number),
            Value::Signed(number) => Some(*number as f64),
            Value::Unsigned(number) => Some(*number as f64),
            _ => None,
        })
    }

    fn list<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        match self.entries.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => values
                .iter()
                .map(|value| convert(value).ok_or_else(|| self.wrong(key, expected)))
                .collect::<Result<_, _>>()
                .map(Some),
            Some(_) => Err(self.wrong(key, expected)),
        }
    }
}
