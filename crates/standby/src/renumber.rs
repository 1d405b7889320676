//! `standby renumber`: makes the tids of a data file grow, so that it can be served.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use standby_disk::{LockFile, OsDisk};
use standby_filestorage::{BlobDir, NewSerial, NewTids, new_tids, write_renumbered};
use standby_node::free_room;
use standby_types::disk::parent;
use standby_types::time::utc;
use standby_types::{Blob, BlobSource, Disk};

/// So many transactions are shown; the rest is counted.
const SHOWN: usize = 10;

/// `standby renumber`
#[derive(Args)]
pub struct Renumber {
    /// The data file.
    #[arg(value_name = "DATA_FS")]
    data: PathBuf,
    /// The directory of its blobs, if it has any (blob-dir in zeo.conf).
    #[arg(long, value_name = "DIR")]
    blob_dir: Option<PathBuf>,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

pub fn run(options: &Renumber) -> anyhow::Result<()> {
    let disk: Arc<dyn Disk> = Arc::new(OsDisk);
    // A link stays one.
    let data = fs::canonicalize(&options.data)
        .with_context(|| format!("cannot find {}", options.data.display()))?;
    let _lock = LockFile::take(&data)?;
    let reading = progress("reading");
    let plan = new_tids(&*disk, &data, &mut |done, total| show(&reading, done, total))?;
    reading.finish_and_clear();
    describe(&data, &plan);
    if plan.renumbered.is_empty() || options.dry_run {
        return Ok(());
    }
    let (copy, former) = (beside(&data, "renumbered"), beside(&data, "before-renumber"));
    if former.exists() {
        bail!(
            "{} is there already, from an earlier run: move it away first, so that it is not lost",
            former.display()
        );
    }
    let (free, needed) = (free_room(parent(&data))?.bytes, plan.end.0);
    if free < needed {
        bail!(
            "the copy takes {} MB, but only {} MB are free at {}",
            needed.div_ceil(1 << 20),
            free >> 20,
            parent(&data).display()
        );
    }
    let written = write(&disk, &data, &plan, &copy, options.blob_dir.as_deref());
    if written.is_err() {
        let _ = fs::remove_file(&copy);
    }
    written?;
    let index = beside(&data, "index");
    if index.exists() {
        fs::remove_file(&index).with_context(|| format!("cannot remove {}", index.display()))?;
    }
    disk.hard_link(&data, &former)
        .with_context(|| format!("cannot keep the former file as {}", former.display()))?;
    disk.rename(&copy, &data).with_context(|| format!("cannot replace {}", data.display()))?;
    disk.sync_dir(parent(&data))?;
    println!(
        "done: {} can be served. The former file is {}. Remove the cache files of clients that \
         have any: what they know of these transactions has the old tids.",
        data.display(),
        former.display()
    );
    Ok(())
}

/// Writes the copy, and gives blobs their new names; they keep the old ones.
fn write(
    disk: &Arc<dyn Disk>,
    data: &Path,
    plan: &NewTids,
    copy: &Path,
    blob_dir: Option<&Path>,
) -> anyhow::Result<()> {
    let writing = progress("writing");
    let mut serials = Vec::new();
    let mut each = |serial: NewSerial| serials.push(serial);
    write_renumbered(disk, data, plan, copy, &mut each, &mut |done, total| {
        show(&writing, done, total);
    })?;
    writing.finish_and_clear();
    let metadata = fs::metadata(data)?;
    fs::set_permissions(copy, metadata.permissions())?;
    chown(copy, Some(metadata.uid()), Some(metadata.gid()))
        .with_context(|| format!("cannot give {} the owner of the former file", copy.display()))?;
    let Some(dir) = blob_dir else {
        let Some(blob) = serials.iter().find(|serial| serial.may_be_blob) else { return Ok(()) };
        bail!(
            "object {} of transaction {} is a blob, and the names of blobs' files have tids in \
             them: say where they are with --blob-dir",
            blob.oid,
            blob.transaction.old
        );
    };
    if !dir.is_dir() {
        bail!("{} is no directory", dir.display());
    }
    let blobs = BlobDir::open(disk.clone(), dir)?;
    let mut missing = 0;
    for NewSerial { oid, transaction, may_be_blob } in serials {
        let (old, new) = (blobs.path(oid, transaction.old), blobs.path(oid, transaction.new));
        // What an earlier run has named is right.
        if new.exists() && !is_same(&old, &new)? {
            bail!(
                "{} is there already, and is not {}: nothing was replaced",
                new.display(),
                old.display()
            );
        }
        let blob = Blob { oid, source: BlobSource::Copy(transaction.old) };
        if (may_be_blob || old.exists()) && !blobs.place(&blob, transaction.new)? {
            missing += 1;
            eprintln!("standby: {} is missing", old.display());
        }
    }
    if missing > 0 {
        eprintln!("standby: {missing} blobs were not there before either");
    }
    Ok(blobs.sync()?)
}

fn describe(data: &Path, plan: &NewTids) {
    let (all, some) = (plan.transactions, plan.renumbered.len());
    if some == 0 {
        println!(
            "{}: the tids of its {all} transactions grow; nothing is to be done",
            data.display()
        );
    } else {
        println!("{}: {some} of {all} transactions get another tid", data.display());
    }
    for renumbered in plan.renumbered.iter().take(SHOWN) {
        let (old, new) = (renumbered.old, renumbered.new);
        println!("  {old} ({}) becomes {new} ({})", utc(old), utc(new));
    }
    if some > SHOWN {
        println!("  and {} more", some - SHOWN);
    }
    if plan.torn > 0 {
        println!(
            "  {} bytes at its end belong to a transaction that was never completed; they are left \
             out, as at each start of a server",
            plan.torn
        );
    }
}

fn beside(data: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}.{suffix}", data.display()))
}

fn is_same(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (io::BufReader::new(one).bytes(), io::BufReader::new(other).bytes());
    loop {
        match (one.next().transpose()?, other.next().transpose()?) {
            (None, None) => return Ok(true),
            (a, b) if a != b => return Ok(false),
            _ => {}
        }
    }
}

/// A bar on a terminal; nothing elsewhere.
fn progress(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::new(0).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn show(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}
