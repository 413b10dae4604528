//! Network namespaces, and how to do something in them.

use std::future::Future;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use nix::sched::CloneFlags;

/// How long something may take that must happen; long, because other builds run beside.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a test in new network and mount namespaces, with `eth0` up.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "needs root");
        println!("skipped: needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        // A /run of its own, so that parallel tests do not wait for each other's xtables lock.
        let none = None::<&str>;
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        nix::mount::mount(none, "/", none, private, none).unwrap();
        nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        forgo_duplicate_detection();
        sh(
            "ip link set lo up; ip link add eth0 type veth peer name wire; ip link set wire up; ip link set eth0 up;
            ip addr add 192.0.2.11/24 dev eth0; ip addr add 2001:db8:1::11/64 dev eth0 nodad",
        );
        // What goes on beside a test goes on while it looks at something.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        runtime.unwrap().block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Interfaces of this namespace use their IPv6 addresses at once. Until a link-local address is known to be nobody
/// else's, no neighbour is asked for, and what is sent first waits for a second.
pub(crate) fn forgo_duplicate_detection() {
    sh("echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad");
}

/// Runs a shell script that must succeed, and returns what it printed.
pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Does something on another host, which is a named namespace. What it opens there stays there.
pub(crate) fn on<T: Send>(host: &str, work: impl FnOnce() -> T + Send) -> T {
    let namespace = std::fs::File::open(format!("/run/netns/{host}")).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Waits until something is so.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
