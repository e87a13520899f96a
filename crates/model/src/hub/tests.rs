//! Tests of hub downloads against a server on the loopback interface.
