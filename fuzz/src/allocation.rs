//! An allocator that ends the process where a single allocation is far larger than any input: bytes
//! from outside have then claimed a length, and were believed.

#![allow(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};

/// No honest allocation for an input of at most 64 KiB comes near.
const LARGEST: usize = 8 << 20;

/// The system's allocator, with that limit.
pub struct Bounded;

fn check(bytes: usize) {
    if bytes > LARGEST {
        // Nothing here may allocate, and an allocator must not unwind.
        eprintln!("an allocation of {bytes} bytes was asked for");
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator unchanged, or ends the process.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: the caller keeps the contract of this very method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above; the block came from the same allocator.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        check(bytes);
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, bytes) }
    }
}
