//! The contract between Arete's stages: aspects, virtues, Parquet rows, run.json, recipes, statistics.
