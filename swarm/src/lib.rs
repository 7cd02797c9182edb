//! Who fetches which chunk from whom, and when: sans-IO.
