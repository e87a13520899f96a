//! Score, comparison, report page and diagnosis of a run.
