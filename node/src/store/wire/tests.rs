use ::layer::wire::{Decoder, Encoder};

use super::*;
use crate::config::{CacheConfig, DiskShare};
use crate::store::memory::MemoryDisk;
use crate::store::tests::Subject;
use crate::store::{LayerStore, Room, Store};

const ROOT: &str = "/store";

/// Frames of a subject's chunks.
struct Frames {
    subject: Subject,
    wire: Vec<Vec<u8>>,
}

impl Frames {
    fn new() -> Self {
        let subject = Subject::new(200_000, 9);
        let mut encoder = Encoder::new();
        let chunks = subject.parts().header.geometry().chunk_count();
        let wire = (0..chunks).map(|chunk| {
            let mut frame = Vec::new();
            encoder.encode(subject.chunk(chunk), &mut frame);
            frame
        });
        Self { wire: wire.collect(), subject }
    }

    fn frame(&self, chunk: u32) -> Frame<'_> {
        Frame::split(&self.wire[chunk as usize]).unwrap().0
    }

    fn add(&self, layer: &LayerStore, chunk: u32) {
        layer.add(chunk, self.subject.chunk(chunk));
        layer.keep(ChunkIndex(chunk), self.frame(chunk));
    }

    /// How many frames are kept; each that is must be right.
    fn kept(&self, layer: &LayerStore) -> usize {
        let mut decoder = Decoder::new();
        let kept = (0..self.wire.len() as u32).filter(|chunk| {
            let mut out = b"before".to_vec();
            let is_kept = layer.read_frame(ChunkIndex(*chunk), &mut out);
            assert!(out.starts_with(b"before"));
            if is_kept {
                let (frame, rest) = Frame::split(&out[6..]).unwrap();
                let plain = decoder.decode(frame, self.subject.chunk(*chunk).len()).unwrap();
                assert!(rest.is_empty() && plain == self.subject.chunk(*chunk), "chunk {chunk} is invented");
            } else {
                assert_eq!(out.len(), 6);
            }
            is_kept
        });
        kept.count()
    }
}

fn open(disk: &MemoryDisk, boot: &str, size: u64) -> (Store, Vec<LayerStore>) {
    let cache = CacheConfig { size: DiskShare::Bytes(size), keep_free: DiskShare::Bytes(0) };
    let (store, found) = Store::open(Arc::new(disk.clone()), Path::new(ROOT), boot, &cache).unwrap();
    store.room().set_keeps_spare(true);
    (store, found.layers)
}

fn create(store: &Store, frames: &Frames) -> LayerStore {
    store.place(store.prepare(&frames.subject.parts()).unwrap()).unwrap()
}

/// What the account says, and what the disk says.
fn is_true(room: &Room, disk: &MemoryDisk) {
    let bytes = |name| disk.allocated_below(Path::new(ROOT), name);
    assert_eq!((room.taken(), room.spare()), (bytes("device") + bytes("wire"), bytes("wire")));
}

#[test]
fn what_was_kept_is_given_as_it_came_also_after_a_kill() {
    let (frames, disk) = (Frames::new(), MemoryDisk::default());
    let (store, _) = open(&disk, "a", 1 << 30);
    let layer = create(&store, &frames);
    assert_eq!(frames.kept(&layer), 0);
    (0..20).for_each(|chunk| frames.add(&layer, chunk));
    // Twice, and one that is not here.
    frames.add(&layer, 3);
    layer.keep(ChunkIndex(30), frames.frame(30));
    // Plain frames are in the device.
    layer.add(21, frames.subject.chunk(21));
    layer.keep(ChunkIndex(21), Frame::Plain(frames.subject.chunk(21)));
    assert_eq!(frames.kept(&layer), 20);
    let mut out = Vec::new();
    assert!(layer.read_frame(ChunkIndex(7), &mut out) && out == frames.wire[7]);
    layer.flush().unwrap();
    is_true(store.room(), &disk);
    drop((layer, store));

    let (store, layers) = open(&disk, "a", 1 << 30);
    is_true(store.room(), &disk);
    assert_eq!(frames.kept(&layers[0]), 20);
    assert_eq!(layers[0].wire().clear(), 20 * 4096);
    is_true(store.room(), &disk);
    assert_eq!(frames.kept(&layers[0]), 0);
    frames.add(&layers[0], 0);
    layers[0].keep(ChunkIndex(0), frames.frame(0));
    assert_eq!(frames.kept(&layers[0]), 1);
}

#[test]
fn a_crash_leaves_empty_slots_and_no_wrong_ones() {
    for seed in 0..40 {
        let (frames, disk) = (Frames::new(), MemoryDisk::default());
        let (store, _) = open(&disk, "a", 1 << 30);
        let layer = create(&store, &frames);
        (0..20).for_each(|chunk| frames.add(&layer, chunk));
        layer.flush().unwrap();
        let crashed = disk.crash(seed);
        drop((layer, store));
        let (store, layers) = open(&crashed, "b", 1 << 30);
        assert!(frames.kept(&layers[0]) <= 20);
        is_true(store.room(), &crashed);
    }
}

#[test]
fn a_slot_that_rots_is_empty() {
    let (frames, disk) = (Frames::new(), MemoryDisk::default());
    let (store, _) = open(&disk, "a", 1 << 30);
    let layer = create(&store, &frames);
    frames.add(&layer, 0);
    let path = layer.device_path().with_file_name(WIRE);
    for bit in 0..(frames.wire[0].len() + CHECK_LEN) as u64 * 8 {
        disk.flip(&path, bit);
        assert_eq!(frames.kept(&layer), 0, "bit {bit}");
        disk.flip(&path, bit);
    }
    assert_eq!(frames.kept(&layer), 1);
}

#[test]
fn what_came_for_other_bytes_is_never_given() {
    let (frames, disk) = (Frames::new(), MemoryDisk::default());
    let (store, _) = open(&disk, "a", 1 << 30);
    let parts = frames.subject.parts();
    let incoming = store.incoming(&parts.header.blob(), 12).unwrap();
    let mut lie = frames.subject.chunk(1).to_vec();
    lie[100] ^= 1;
    let mut wire = Vec::new();
    Encoder::new().encode(&lie, &mut wire);
    for chunk in 0..5 {
        let (plain, frame) = match chunk {
            1 => (&lie[..], Frame::split(&wire).unwrap().0),
            _ => (frames.subject.chunk(chunk), frames.frame(chunk)),
        };
        incoming.write(ChunkIndex(chunk), plain).unwrap();
        incoming.keep(ChunkIndex(chunk), frame);
    }
    let layer = store.place(store.prepare_incoming(&incoming, &parts).unwrap()).unwrap();
    drop(incoming);
    assert_eq!(frames.kept(&layer), 4);
    // The right one came without a frame.
    layer.add(1, frames.subject.chunk(1));
    assert_eq!(frames.kept(&layer), 4);
    layer.flush().unwrap();
    is_true(store.room(), &disk);
    // The file moved with its layer.
    layer.wire().clear();
    is_true(store.room(), &disk);
    assert_eq!(disk.allocated_below(Path::new(ROOT), WIRE), 0);
}

#[test]
fn it_takes_only_what_nobody_else_needs() {
    let (frames, disk) = (Frames::new(), MemoryDisk::default());
    // The marks lie at 29/32, 30/32 and 31.5/32 of it.
    let size = 32 * 8 * 4096;
    let (store, _) = open(&disk, "a", size);
    let (layer, room) = (create(&store, &frames), store.room().clone());
    let slack = room.slack();
    (0..20).for_each(|chunk| frames.add(&layer, chunk));
    // To the background they are as good as free.
    assert_eq!((room.spare(), room.slack()), (20 * 4096, slack - 20 * 4096));
    assert!(room.take(size * 29 / 32 - room.taken() - 4096));
    frames.add(&layer, 20);
    assert_eq!((frames.kept(&layer), room.spare_excess()), (20, 0));
    assert!(room.take(8 * 4096) && room.spare_excess() == 0);
    assert!(room.take(4096));
    assert_eq!((room.spare_excess(), room.excess()), (9 * 4096, 0));
    disk.set_room(Some(0));
    room.note_failure(&std::io::ErrorKind::StorageFull.into());
    assert_eq!(room.spare_excess(), room.spare());
    disk.set_room(None);
    room.note_success();
    // Who does not share keeps nothing.
    assert_eq!(layer.wire().clear(), 20 * 4096);
    room.set_keeps_spare(false);
    layer.keep(ChunkIndex(0), frames.frame(0));
    assert_eq!(frames.kept(&layer), 0);
}
