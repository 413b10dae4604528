//! The real programs: Kubernetes, etcd and MetalLB, built from their Go modules and cached.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::say;

/// Where the built programs are.
#[derive(Clone, Debug)]
pub struct Binaries {
    kubernetes: PathBuf,
    metallb: PathBuf,
}

impl Binaries {
    /// Builds what is not in the cache: about 8 minutes on two cores the first time.
    ///
    /// # Errors
    /// When Go is missing or a build fails.
    pub fn build() -> Result<Binaries> {
        let cache = cache_directory()?;
        Ok(Binaries {
            kubernetes: module(&cache, "kubernetes", "about 7 minutes on two cores")?,
            metallb: module(&cache, "metallb", "about a minute")?,
        })
    }

    /// The path of a program.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        match name {
            "controller" | "speaker" => self.metallb.join(name),
            // etcd's main package is its module's root, called `server`.
            "etcd" => self.kubernetes.join("server"),
            _ => self.kubernetes.join(name),
        }
    }

    /// MetalLB's manifest, as its release ships it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn metallb_manifest(&self) -> Result<String> {
        let path = self.metallb.join(MANIFEST);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

const MANIFEST: &str = "metallb-native.yaml";

fn cache_directory() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home =
                std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?;
            PathBuf::from(home).join(".cache")
        }
    };
    let cache = base.join("metaleg-lab");
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    Ok(cache)
}

/// Builds all tools of a module, unless a directory keyed by its lock files has them.
fn module(cache: &Path, name: &str, duration: &str) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("controlplane")
        .join(name);
    let mut hash = Sha256::new();
    for file in ["go.mod", "go.sum"] {
        let path = source.join(file);
        let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        hash.update(content);
    }
    let key: String = hash
        .finalize()
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect();
    let target = cache.join(format!("{name}-{key}"));
    if target.exists() {
        return Ok(target);
    }
    // Two runs side by side build once; the lock goes with its file descriptor.
    let file = fs::File::create(cache.join(format!("{name}.lock")))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("cannot lock the cache")?;
    if target.exists() {
        return Ok(target);
    }
    let started = Instant::now();
    say!("building {name} from its Go modules ({duration}, then cached)");
    let partial = cache.join(format!("{name}-partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir_all(&partial)?;
    let tools = go(&source, ["list", "tool"])?;
    for tool in tools.lines() {
        let package = tool.rsplit('/').next().unwrap_or(tool);
        say!("  {package}");
        let output = partial.as_os_str();
        go(
            &source,
            ["build", "-trimpath", "-ldflags=-s -w", "-o"]
                .map(OsStr::new)
                .into_iter()
                .chain([output, OsStr::new(tool)]),
        )?;
    }
    // go names the program of a module's versioned root after the part before the version.
    let versioned = partial.join("v3");
    if versioned.exists() {
        fs::rename(versioned, partial.join("server"))?;
    }
    if name == "metallb" {
        let list = ["list", "-m", "-f", "{{.Dir}}", "go.universe.tf/metallb"];
        let directory = go(&source, list)?;
        let manifest = Path::new(directory.trim())
            .join("config/manifests")
            .join(MANIFEST);
        // Not a copy: files of the module cache are read-only, and so would the copy be.
        fs::write(partial.join(MANIFEST), fs::read(manifest)?)?;
    }
    fs::rename(&partial, &target)?;
    say!("  done in {} s", started.elapsed().as_secs());
    Ok(target)
}

fn go<A: AsRef<OsStr>>(directory: &Path, args: impl IntoIterator<Item = A>) -> Result<String> {
    let output = Command::new("go")
        .args(args)
        .current_dir(directory)
        .env("CGO_ENABLED", "0")
        .stdin(Stdio::null())
        .output()
        .context("cannot start `go`: install Go 1.26 or newer")?;
    if !output.status.success() {
        bail!("go failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
