//! What containerd's own unpacker makes of odd tars, and what the scanner, the image and the kernel make of them.

use std::fs;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, lchown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lab::compare::compare;
use layer::entry::Kind;
use layer::tar::TarError;
use layer::tree::Tree;
use tempfile::TempDir;

use super::set_time;
use crate::image::{Image, run, scan, skipped};

/// Pairs of random layers. Each layer is unpacked by containerd and mounted as an image.
const PAIRS: u64 = 300;

/// SplitMix64: small, and the same everywhere, so that a failure's number repeats it.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn name(&mut self) -> String {
        let mut name = self.pick(&["", "", "", "", "./", "/", "../"]).to_owned();
        for _ in 0..self.pick(&[0, 0, 1, 1, 2]) {
            name += self.pick(&["a/", "b/", "c/", "d/", "a/", "b/", "./", "../", "d//"]);
        }
        name + self.pick(&["a", "b", "c", "d", "e", "f"])
    }

    fn layer(&mut self) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for _ in 0..1 + self.below(9) {
            self.entry(&mut builder);
        }
        builder.into_inner().unwrap()
    }

    fn entry(&mut self, builder: &mut tar::Builder<Vec<u8>>) {
        let type_flag = self.pick(b"0000\x00555555221136g");
        let mut name = match self.below(100) {
            0..8 => self.name() + "/.wh." + self.pick(&["a", "b", "c", "d", ".", "", ".wh.x"]),
            8..12 => self.name() + "/.wh..wh..opq",
            12..14 => self.pick(&["", ".", "./", "a/..", "..", "/"]).to_owned(),
            _ => self.name(),
        };
        if type_flag == b'5' && self.chance(70) {
            name.push('/');
        }
        let target = match type_flag {
            b'1' => self.name(),
            b'2' => self.pick(&["a", "b", "../c", "/d", "d/e", "../../a/b", "f", "/"]).to_owned(),
            _ => String::new(),
        };
        let mut records: Vec<(&str, Vec<u8>)> = Vec::new();
        if self.chance(20) {
            let time = self.pick(&["1000.5", "-1.5", "99.999999999", "9223372036.9", "0"]);
            records.push(("mtime", time.into()));
        }
        for xattr in ["user.x", "user.y", "security.capability", "trusted.x", "trusted.overlay.opaque", "other.x"] {
            if self.chance(12) {
                let mut value = vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                if xattr != "security.capability" {
                    value.truncate(self.below(20) as usize);
                }
                let key = match xattr {
                    "user.x" => "SCHILY.xattr.user.x",
                    "user.y" => "SCHILY.xattr.user.y",
                    "security.capability" => "SCHILY.xattr.security.capability",
                    "trusted.x" => "SCHILY.xattr.trusted.x",
                    "trusted.overlay.opaque" => "SCHILY.xattr.trusted.overlay.opaque",
                    _ => "SCHILY.xattr.other.x",
                };
                records.push((key, value));
            }
        }
        if self.chance(8) {
            // containerd's unpacker knows only the other form of extended attributes.
            records.push(("LIBARCHIVE.xattr.user.z", b"eA==".to_vec()));
        }
        // What a header has no room for stands before it, in one of two forms; what the header says then counts for nothing.
        let (mut long_name, mut long_target) = (false, false);
        match self.below(100) {
            0..8 => records.push(("path", name.clone().into())),
            8..14 => long_name = true,
            _ => {}
        }
        if !target.is_empty() {
            match self.below(100) {
                0..8 => records.push(("linkpath", target.clone().into())),
                8..14 => long_target = true,
                _ => {}
            }
        }
        for key in ["uid", "gid"] {
            if self.chance(6) {
                records.push((key, self.pick(&["7", "70000", "3000000"]).into()));
            }
        }
        let contents = vec![b'x'; if matches!(type_flag, b'0' | 0) { self.below(1200) as usize } else { 0 }];
        let is_size_before = !contents.is_empty() && self.chance(8);
        if is_size_before {
            records.push(("size", contents.len().to_string().into()));
        }
        for (is_long, type_flag, text) in [(long_name, b'L', &name), (long_target, b'K', &target)] {
            if is_long {
                let mut header = tar::Header::new_gnu();
                header.as_mut_bytes()[..13].copy_from_slice(b"././@LongLink");
                header.as_mut_bytes()[156] = type_flag;
                header.set_size(text.len() as u64 + 1);
                header.set_cksum();
                builder.append(&header, format!("{text}\0").as_bytes()).unwrap();
            }
        }
        let in_header = |is_elsewhere: bool, text: &str| if is_elsewhere { "f".to_owned() } else { text.to_owned() };
        let name = in_header(long_name || records.iter().any(|(key, _)| *key == "path"), &name);
        let target = in_header(long_target || records.iter().any(|(key, _)| *key == "linkpath"), &target);
        if !records.is_empty() {
            builder.append_pax_extensions(records.iter().map(|(key, value)| (*key, &value[..]))).unwrap();
        }
        let mut header = if self.chance(80) { tar::Header::new_ustar() } else { tar::Header::new_gnu() };
        let bytes = header.as_mut_bytes();
        bytes.iter_mut().zip(name.bytes()).take(100).for_each(|(to, from)| *to = from);
        bytes[157..257].iter_mut().zip(target.bytes()).for_each(|(to, from)| *to = from);
        bytes[156] = type_flag;
        if header.as_ustar().is_some() && self.chance(6) {
            bytes_of_prefix(&mut header).copy_from_slice(self.pick(&[b"a\0\0", b"./b", b"c/d"]));
        }
        header.set_size(if is_size_before { 0 } else { contents.len() as u64 });
        header.set_mode(if type_flag == b'5' {
            self.pick(&[0o755, 0o755, 0o700, 0o1777, 0o2775])
        } else {
            self.pick(&[0o644, 0o4711])
        });
        header.set_uid(self.below(4));
        // More than seven octal digits hold: base 256.
        header.set_gid(if self.chance(6) { 3_000_000 } else { self.below(4) });
        header.set_mtime(1_000_000 + self.below(1000));
        if self.chance(5) {
            header.as_mut_bytes()[136..148].copy_from_slice(&[[0xff; 4], [0xff; 4], [0xff, 0xff, 0xfe, 0x0c]].concat());
        }
        header.set_device_major(1).unwrap();
        header.set_device_minor(self.below(4) as u32).unwrap();
        header.set_cksum();
        builder.append(&header, &contents[..]).unwrap();
    }
}

/// The first bytes of what a POSIX header puts before the name.
fn bytes_of_prefix(header: &mut tar::Header) -> &mut [u8] {
    &mut header.as_mut_bytes()[345..348]
}

/// Unpacks layers with containerd: tar, directory, directories below. Gives its errors.
fn unpack(layers: &[(PathBuf, PathBuf, Option<PathBuf>)]) -> Vec<Result<(), String>> {
    let build = lab::tools::workspace().join("integration/tools/build.sh");
    let folder = run(Command::new(build).arg("unpack").env("CARGO_TARGET_DIR", lab::tools::target().unwrap()));
    let mut command = Command::new(Path::new(folder.trim()).join("containerd-unpack"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let list: String = layers
        .iter()
        .map(|(tar, root, below)| {
            let below = below.iter().map(|below| format!("\t{}", below.display())).collect::<String>();
            format!("{}\t{}{below}\n", tar.display(), root.display())
        })
        .collect();
    let writer = std::thread::spawn(move || input.write_all(list.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    let output = String::from_utf8(output.stdout).unwrap();
    let results: Vec<_> =
        output.lines().map(|line| line.strip_prefix("error: ").map_or(Ok(()), |error| Err(error.to_owned()))).collect();
    assert_eq!(results.len(), layers.len());
    results
}

/// Brings what containerd leaves to chance, or what nobody sees, into the form that the image has.
fn normalize(unpacked: &Path, mounted: &Path, tree: &Tree) {
    for entry in tree.entries() {
        let path = str::from_utf8(&entry.path).unwrap();
        match entry.kind {
            Kind::Whiteout => {
                lchown(unpacked.join(path), Some(0), Some(0)).unwrap();
                set_time(&unpacked.join(path), 0, 0);
            }
            // Making something in it set its time.
            Kind::ImplicitDirectory { .. } => {
                let shown = fs::metadata(mounted.join(path)).unwrap();
                set_time(&unpacked.join(path), shown.mtime(), shown.mtime_nsec());
            }
            _ => {}
        }
    }
    set_time(unpacked, 0, 0);
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 16];
    rustix::fs::lgetxattr(path, "trusted.overlay.opaque", &mut value[..]).is_ok_and(|len| value[..len] == *b"y")
}

/// What the two make differently of a layer, in words.
fn differences(
    folder: &Path,
    tar: &Path,
    unpacked: &Path,
    outcome: &Result<(), String>,
    lower: &[&Tree],
) -> Vec<String> {
    let tree = match (scan(tar), outcome) {
        (Ok(tree), Ok(())) => tree,
        (Err(_), Err(_)) => return Vec::new(),
        // The one thing that containerd takes and we decline: another name for a whiteout.
        (Err(TarError::Unsupported(reason)), Ok(())) if reason.contains("points to a whiteout") => return Vec::new(),
        (Err(error), Ok(())) => return vec![format!("containerd takes it, the scanner says: {error}")],
        // A layer is scanned without those below it, of which containerd refuses some: there it fails for everyone.
        (Ok(_), Err(error)) if !lower.is_empty() && (error.contains("-lower/") || error == "too many links") => {
            return Vec::new();
        }
        (Ok(_), Err(error)) => return vec![format!("the scanner takes it, containerd says: {error}")],
    };
    let image = Image::of_tree(tar, &tree, lower, false);
    let mounted = image.mount(&folder.join("mounted"));
    normalize(unpacked, &mounted.0, &tree);
    let mut differences = compare(unpacked, &mounted.0).unwrap().differences;
    for entry in tree.entries().iter().filter(|entry| entry.kind.is_directory()) {
        let path = str::from_utf8(&entry.path).unwrap();
        if is_opaque(&unpacked.join(path)) != is_opaque(&mounted.0.join(path)) {
            differences.push(format!("/{path}: opaque in one"));
        }
    }
    differences
}

#[test]
fn random_layers_are_as_containerd_unpacks_them() {
    if skipped() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let at = |pair: u64, name: &str| folder.path().join(format!("{pair}-{name}"));
    let mut layers = Vec::new();
    for pair in 0..PAIRS {
        let mut random = Random(pair);
        for name in ["lower.tar", "upper.tar"] {
            File::create(at(pair, name)).unwrap().write_all(&random.layer()).unwrap();
        }
        layers.push((at(pair, "lower.tar"), at(pair, "lower"), None));
        layers.push((at(pair, "upper.tar"), at(pair, "upper"), Some(at(pair, "lower"))));
    }
    let outcomes = unpack(&layers);
    let mut failures = Vec::new();
    let mut taken = 0;
    for (pair, outcomes) in (0..PAIRS).zip(outcomes.chunks(2)) {
        let [lower_outcome, upper_outcome] = outcomes else { unreachable!() };
        let mut check = |name: &str, outcome: &Result<(), String>, lower: &[&Tree]| {
            taken += u64::from(outcome.is_ok());
            let tar = at(pair, name).with_extension("tar");
            let found = differences(folder.path(), &tar, &at(pair, name), outcome, lower);
            failures.extend(found.into_iter().map(|difference| format!("pair {pair}, {name}: {difference}")));
        };
        check("lower", lower_outcome, &[]);
        if lower_outcome.is_ok()
            && let Ok(tree) = scan(&at(pair, "lower.tar"))
        {
            check("upper", upper_outcome, &[&tree]);
        }
    }
    println!("{taken} of {} layers were taken by containerd", layers.len());
    assert!(taken > PAIRS / 4, "too few layers are valid for this test to mean anything");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
