//! The only room with unsafe code in this crate: the memory that the C library keeps.

use nix::libc;

/// Bounds what the C library's allocator keeps of freed memory. Its defaults (eight arenas a processor, a size for mappings of
/// their own that grows up to 32 MiB) suit programs that allocate evenly; here an image build, an ingest or a burst of chunks is
/// followed by nothing. To be called before there are other threads.
pub fn bound_malloc() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 2),
        // Above a chunk with its wire form, so that those are reused; what is larger goes back to the kernel when it is freed.
        (libc::M_MMAP_THRESHOLD, 512 << 10),
        (libc::M_TRIM_THRESHOLD, 1 << 20),
    ] {
        // SAFETY: takes two numbers and touches nothing but the allocator, which does its own locking.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives all freed memory back to the kernel.
pub fn trim_malloc() {
    #[cfg(target_env = "gnu")]
    // SAFETY: frees nothing that is in use, and the allocator does its own locking.
    unsafe {
        libc::malloc_trim(0);
    }
}
