//! For tests: a node whose disk forgets, at SIGUSR1, all that was not synced; then the process is
//! gone, as by a power cord.
//!
//! Bytes and names are written to the real disk, but it is remembered what they replace, until the
//! file, or the directory, is synced. When power fails, everything that is not durable is taken
//! back; or, every second time, a random half of it: what was not synced may survive in part and in
//! any order.
//!
//! `unplugged -C FILE`. What a node writes without `Disk` is not followed.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use standby_config::Config;
use standby_disk::OsDisk;
use standby_logging as logging;
use standby_node::{Next, start_on};
use standby_types::disk::{Disk, File, Mapped, Open, parent, read_full};
use standby_types::lock::lock;
use tokio::signal::unix::{SignalKind, signal};

const SECTOR: u64 = 512;

/// What of a file is not durable.
#[derive(Default)]
struct Unsynced {
    durable_len: u64,
    /// What was in sectors that were written since the last sync, as far as they were durable.
    before: BTreeMap<u64, Vec<u8>>,
}

/// A change of names that is not durable.
enum Renaming {
    Made(PathBuf),
    /// From, to, and where the file is kept whose name was taken.
    Renamed(PathBuf, PathBuf, Option<PathBuf>),
    /// The name, and where the file is kept.
    Removed(PathBuf, PathBuf),
}

impl Renaming {
    fn dir(&self) -> &Path {
        match self {
            Renaming::Made(path) | Renaming::Removed(path, _) => parent(path),
            Renaming::Renamed(_, to, _) => parent(to),
        }
    }
}

/// See the module.
#[derive(Clone)]
struct PowerDisk(Arc<Inner>);

struct Inner {
    /// Written to when power fails: nothing is under way then.
    plugged: RwLock<()>,
    /// Never locked while `files` is.
    names: Mutex<Vec<Renaming>>,
    files: Mutex<HashMap<u64, Arc<Mutex<Unsynced>>>>,
    /// Where files are kept that may come back.
    kept: PathBuf,
    number: std::sync::atomic::AtomicU64,
}

impl PowerDisk {
    fn on(&self) -> RwLockReadGuard<'_, ()> {
        self.0.plugged.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, path: &Path) -> io::Result<PathBuf> {
        let number = self.0.number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let kept = self.0.kept.join(number.to_string());
        std::fs::hard_link(path, &kept)?;
        Ok(kept)
    }

    fn note(&self, renaming: Renaming) {
        lock(&self.0.names).push(renaming);
    }

    /// Power fails.
    fn unplug(&self) -> ! {
        let _off = self.0.plugged.write().unwrap_or_else(PoisonError::into_inner);
        let mut chance = Chance(u64::from(std::process::id()) << 32 | self.number());
        let in_part = chance.one_in_two();
        let mut open: HashMap<u64, PathBuf> = HashMap::new();
        // Files that have a name now, or had one.
        let named = lock(&self.0.names);
        let mut dirs: Vec<PathBuf> = named.iter().map(|one| one.dir().to_owned()).collect();
        dirs.extend(ROOTS.get().into_iter().flatten().cloned());
        for dir in dirs {
            walk(&dir, &mut open);
        }
        for (inode, unsynced) in lock(&self.0.files).iter() {
            let Some(path) = open.get(inode) else { continue };
            let unsynced = lock(unsynced);
            let file = std::fs::OpenOptions::new().write(true).open(path);
            let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let keeps_length = in_part && chance.one_in_two();
            if !keeps_length && file.metadata().is_ok_and(|m| m.len() > unsynced.durable_len) {
                file.set_len(unsynced.durable_len).expect("cut");
            }
            for (sector, bytes) in &unsynced.before {
                if !in_part || chance.one_in_two() {
                    use std::os::unix::fs::FileExt;
                    file.write_all_at(bytes, sector * SECTOR).expect("write");
                }
            }
        }
        let names_survive = in_part && chance.one_in_two();
        for renaming in named.iter().rev().filter(|_| !names_survive) {
            let undone = match renaming {
                Renaming::Made(path) => std::fs::remove_file(path),
                Renaming::Removed(path, kept) => std::fs::rename(kept, path),
                Renaming::Renamed(from, to, kept) => std::fs::rename(to, from)
                    .and_then(|()| kept.as_ref().map_or(Ok(()), |kept| std::fs::rename(kept, to))),
            };
            if let Err(error) = undone {
                eprintln!("unplugged: a name cannot be taken back: {error}");
            }
        }
        std::process::exit(99);
    }

    fn number(&self) -> u64 {
        self.0.number.load(std::sync::atomic::Ordering::Relaxed)
    }
}

static ROOTS: std::sync::OnceLock<Vec<PathBuf>> = std::sync::OnceLock::new();

fn walk(dir: &Path, found: &mut HashMap<u64, PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => walk(&entry.path(), found),
            Ok(metadata) => drop(found.insert(metadata.ino(), entry.path())),
            Err(_) => {}
        }
    }
}

struct Chance(u64);

impl Chance {
    fn one_in_two(&mut self) -> bool {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) & 1 == 1
    }
}

struct PowerFile {
    file: Arc<dyn File>,
    disk: PowerDisk,
    unsynced: Arc<Mutex<Unsynced>>,
}

impl PowerFile {
    /// Remembers what is durable in these bytes before they change.
    fn remember(&self, unsynced: &mut Unsynced, from: u64, to: u64) -> io::Result<()> {
        let to = to.min(unsynced.durable_len);
        for sector in from / SECTOR..to.div_ceil(SECTOR) {
            if from < to && !unsynced.before.contains_key(&sector) {
                let at = sector * SECTOR;
                let mut bytes = vec![0; SECTOR.min(unsynced.durable_len - at) as usize];
                read_full(&*self.file, &mut bytes, at)?;
                unsynced.before.insert(sector, bytes);
            }
        }
        Ok(())
    }
}

impl File for PowerFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_cached_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let _on = self.disk.on();
        let mut unsynced = lock(&self.unsynced);
        self.remember(&mut unsynced, offset, offset + bytes.len() as u64)?;
        self.file.write_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _on = self.disk.on();
        let mut unsynced = lock(&self.unsynced);
        self.remember(&mut unsynced, len, u64::MAX)?;
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        let _on = self.disk.on();
        // As long as a device takes, so that others write meanwhile.
        std::thread::sleep(std::time::Duration::from_micros(300));
        let mut unsynced = lock(&self.unsynced);
        unsynced.before.clear();
        unsynced.durable_len = self.file.len()?;
        Ok(())
    }
}

impl Disk for PowerDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Arc<dyn File>> {
        let _on = self.on();
        let made = !path.exists();
        let file = OsDisk.open(path, open)?;
        let metadata = std::fs::metadata(path)?;
        if made {
            self.note(Renaming::Made(path.to_owned()));
        }
        let mut files = lock(&self.0.files);
        let unsynced = match made {
            true => {
                let unsynced = Arc::<Mutex<Unsynced>>::default();
                files.insert(metadata.ino(), unsynced.clone());
                unsynced
            }
            // What was there when the process began is durable.
            false => files
                .entry(metadata.ino())
                .or_insert_with(|| {
                    let durable_len = metadata.len();
                    Arc::new(Mutex::new(Unsynced { durable_len, ..Unsynced::default() }))
                })
                .clone(),
        };
        Ok(Arc::new(PowerFile { file, disk: self.clone(), unsynced }))
    }

    fn map(&self, path: &Path) -> io::Result<Mapped> {
        OsDisk.map(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        OsDisk.exists(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let _on = self.on();
        let kept = if to.exists() { Some(self.keep(to)?) } else { None };
        OsDisk.rename(from, to)?;
        if from.is_dir() || to.is_dir() {
            return Ok(());
        }
        self.note(Renaming::Renamed(from.to_owned(), to.to_owned(), kept));
        Ok(())
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let _on = self.on();
        OsDisk.hard_link(from, to)?;
        self.note(Renaming::Made(to.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let _on = self.on();
        let kept = self.keep(path)?;
        OsDisk.remove(path)?;
        self.note(Renaming::Removed(path.to_owned(), kept));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        OsDisk.list(dir)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        OsDisk.create_dir(dir)
    }

    fn create_private_dir(&self, dir: &Path) -> io::Result<()> {
        OsDisk.create_private_dir(dir)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        OsDisk.remove_dir(dir)
    }

    fn make_read_only(&self, path: &Path) -> io::Result<()> {
        OsDisk.make_read_only(path)
    }

    fn wait_for_room(&self) {
        OsDisk.wait_for_room();
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let _on = self.on();
        let mut names = lock(&self.0.names);
        for renaming in names.extract_if(.., |renaming| renaming.dir() == dir) {
            let kept = match renaming {
                Renaming::Made(_) => None,
                Renaming::Renamed(_, _, kept) => kept,
                Renaming::Removed(_, kept) => Some(kept),
            };
            if let Some(kept) = kept {
                let metadata = std::fs::metadata(&kept)?;
                if metadata.nlink() == 1 {
                    // Its number may be given to another file.
                    lock(&self.0.files).remove(&metadata.ino());
                }
                std::fs::remove_file(kept)?;
            }
        }
        Ok(())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some("-C"), Some(file)) = (arguments.next().as_deref(), arguments.next()) else {
        anyhow::bail!("unplugged -C FILE");
    };
    let config = Config::read(Path::new(&file))?;
    let _log_files = logging::start(config.eventlog.as_ref())?;
    let directory = parent(Path::new(&file)).to_owned();
    let kept = directory.join("kept");
    std::fs::create_dir_all(&kept)?;
    for entry in std::fs::read_dir(&kept)? {
        std::fs::remove_file(entry?.path())?;
    }
    let _ = ROOTS.set(vec![directory]);
    let inner = Inner {
        plugged: RwLock::default(),
        files: Mutex::default(),
        names: Mutex::default(),
        kept,
        number: Default::default(),
    };
    let disk = PowerDisk(Arc::new(inner));
    let (cord, mut pulled) = (disk.clone(), signal(SignalKind::user_defined1())?);
    std::thread::spawn({
        let runtime = tokio::runtime::Handle::current();
        move || {
            runtime.block_on(pulled.recv());
            cord.unplug()
        }
    });
    let mut terminate = signal(SignalKind::terminate())?;
    let node = start_on(config, Arc::new(disk)).await?;
    let stop = async move {
        let _ = terminate.recv().await;
    };
    if node.run_until(stop).await? == Next::Again {
        // What this process knows of unsynced bytes goes with it: what a node writes before it
        // begins anew is synced.
        let again = Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec();
        return Err(again.into());
    }
    // The node's threads wait for the runtime's clock: they go with the process, not before it.
    std::process::exit(0)
}
