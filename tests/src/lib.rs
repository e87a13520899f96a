//! Home of the workspace-wide tests; see the files beside this folder.
