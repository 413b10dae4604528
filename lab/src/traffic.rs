//! Traffic that goes on whatever happens to the cluster, and what it suffered.
//!
//! Every pod has, in each family, a connection that asks and is answered all the time, a socket that does the same
//! with datagrams, and new connections at a steady pace.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{sleep, timeout};

use crate::host::Host;
use crate::probe::{PORT, Seen};
use crate::{Family, Outside};

/// Between an answer and the next question: finer than the silence that is looked for.
const PACE: Duration = Duration::from_millis(30);
/// Between new connections: a pod of the lab has 1,000 source ports, which are used again after a minute.
const DIAL_PACE: Duration = Duration::from_millis(100);
/// Less than the kernel's first retransmission of a SYN: a connection counts when its first packets come through.
const DIAL_PATIENCE: Duration = Duration::from_millis(900);
/// A datagram that is not answered by then is lost.
const DATAGRAM_PATIENCE: Duration = Duration::from_millis(100);
/// A flow that has come through within this time goes on.
const ALIVE: Duration = Duration::from_secs(1);
/// A flow that does not go on for so long hangs: after a silence of seven seconds TCP tries again in the thirteenth.
const HANGS: Duration = Duration::from_secs(15);

/// What a flow is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// One TCP connection.
    Stream,
    /// One UDP socket.
    Datagrams,
    /// A new TCP connection every time.
    Dials,
}

/// What a flow suffered.
#[derive(Clone, Debug)]
pub struct Suffered {
    /// The pod's name.
    pub pod: String,
    /// What the flow is made of.
    pub kind: Kind,
    /// Its family.
    pub family: Family,
    /// The longest time without a sign of life: for new connections, between the starts of two that came through.
    pub silence: Duration,
    /// How often it came through.
    pub answers: usize,
    /// Why it ended, if it did.
    pub broken: Option<String>,
    /// As whom it was seen.
    pub sources: BTreeSet<IpAddr>,
    /// When it ended, or came through last.
    pub last: Instant,
}

#[derive(Debug)]
struct Flow {
    kind: Kind,
    family: Family,
    record: Mutex<Record>,
}

#[derive(Debug)]
struct Record {
    last: Instant,
    silence: Duration,
    answers: usize,
    broken: Option<String>,
    sources: BTreeSet<IpAddr>,
    /// The address and port that a stream had at first.
    peer: Option<String>,
}

impl Flow {
    fn new(kind: Kind, family: Family) -> Arc<Flow> {
        Arc::new(Flow {
            kind,
            family,
            record: Mutex::new(Record {
                last: Instant::now(),
                silence: Duration::ZERO,
                answers: 0,
                broken: None,
                sources: BTreeSet::new(),
                peer: None,
            }),
        })
    }

    /// Notes an answer to what was started at a time.
    fn answered(&self, started: Instant, line: &str) {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let silence = started.saturating_duration_since(record.last);
        record.silence = record.silence.max(silence);
        record.last = record.last.max(started);
        record.answers += 1;
        record.sources.extend(Seen::from_line(line).address());
        let peer = line.split_once(' ').map_or(line, |(_, peer)| peer.trim());
        match &record.peer {
            Some(first) if self.kind == Kind::Stream && first != peer => {
                record.broken = Some(format!("was {first}, is {peer}"));
            }
            Some(_) => {}
            None => record.peer = Some(peer.to_owned()),
        }
    }

    fn broke(&self, why: String) {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.last = Instant::now();
        record.broken = Some(why);
    }

    fn take(&self, pod: &str) -> Suffered {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let silence = match &record.broken {
            Some(_) => record.silence,
            None => record.silence.max(record.last.elapsed()),
        };
        let suffered = Suffered {
            pod: pod.to_owned(),
            kind: self.kind,
            family: self.family,
            silence,
            answers: record.answers,
            broken: record.broken.clone(),
            sources: record.sources.clone(),
            last: record.last,
        };
        record.silence = Duration::ZERO;
        record.answers = 0;
        record.sources.clear();
        suffered
    }

    async fn run(self: Arc<Flow>, outside: Outside) {
        let to = SocketAddr::new(outside.address(self.family), PORT);
        match self.kind {
            Kind::Stream => {
                if let Err(error) = self.stream(to).await {
                    self.broke(format!("{error:#}"));
                }
            }
            Kind::Datagrams => {
                if let Err(error) = self.datagrams(to).await {
                    self.broke(format!("{error:#}"));
                }
            }
            Kind::Dials => self.dials(to).await,
        }
    }

    async fn stream(&self, to: SocketAddr) -> Result<()> {
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        loop {
            match lines.next_line().await? {
                Some(line) => self.answered(Instant::now(), &line),
                None => bail!("closed by the other side"),
            }
            sleep(PACE).await;
            writer.write_all(b"?\n").await?;
        }
    }

    async fn datagrams(&self, to: SocketAddr) -> Result<()> {
        let any: IpAddr = match self.family {
            Family::V4 => [0; 4].into(),
            Family::V6 => [0_u16; 8].into(),
        };
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(to).await?;
        let mut buffer = [0; 64];
        loop {
            // ICMP errors come back as errors: they are no end for datagrams.
            let _ = socket.send(b"?").await;
            if let Ok(Ok(length)) = timeout(DATAGRAM_PATIENCE, socket.recv(&mut buffer)).await {
                let line = String::from_utf8_lossy(&buffer[..length]);
                self.answered(Instant::now(), &line);
            }
            sleep(PACE).await;
        }
    }

    async fn dials(self: Arc<Flow>, to: SocketAddr) {
        loop {
            let flow = self.clone();
            tokio::task::spawn_local(async move {
                let started = Instant::now();
                let dial = async {
                    let stream = TcpStream::connect(to).await?;
                    let mut line = String::new();
                    BufReader::new(stream).read_line(&mut line).await?;
                    std::io::Result::Ok(line)
                };
                if let Ok(Ok(line)) = timeout(DIAL_PATIENCE, dial).await
                    && !line.is_empty()
                {
                    flow.answered(started, &line);
                }
            });
            sleep(DIAL_PACE).await;
        }
    }
}

/// A pod that sends from the first moment on, before anybody knows of it.
#[derive(Debug)]
pub struct Beginning {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    answers: Arc<Mutex<Vec<(Instant, Seen)>>>,
}

impl Beginning {
    /// Sends a datagram to a server outside every millisecond.
    pub(crate) fn start(host: &Host, family: Family) -> Result<Beginning> {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(Mutex::new(Vec::new()));
        let thread = host.inside({
            let (stop, answers) = (stop.clone(), answers.clone());
            move || {
                let any: IpAddr = match family {
                    Family::V4 => [0; 4].into(),
                    Family::V6 => [0_u16; 8].into(),
                };
                let Ok(socket) = std::net::UdpSocket::bind((any, 0)) else {
                    return;
                };
                // Without it the thread would never end, which the lab's caller would see.
                let _ = socket.set_read_timeout(Some(Duration::from_millis(1)));
                let to = SocketAddr::new(Outside::Lan.address(family), PORT);
                let mut buffer = [0; 64];
                while !stop.load(Ordering::Relaxed) {
                    // No route yet, and refusals: that is what is looked at.
                    let _ = socket.send_to(b"?", to);
                    if let Ok((length, _)) = socket.recv_from(&mut buffer) {
                        let seen = Seen::from_line(&String::from_utf8_lossy(&buffer[..length]));
                        let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                        answers.push((Instant::now(), seen));
                    }
                }
            }
        })?;
        Ok(Beginning {
            stop,
            thread: Some(thread),
            answers,
        })
    }

    /// When the first answer came, if one has come.
    #[must_use]
    pub fn first_answer(&self) -> Option<Instant> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.first().map(|(at, _)| *at)
    }

    /// As whom the pod was seen so far.
    #[must_use]
    pub fn sources(&self) -> BTreeSet<IpAddr> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers
            .iter()
            .filter_map(|(_, seen)| seen.address())
            .collect()
    }
}

impl Drop for Beginning {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there.
            let _ = thread.join();
        }
    }
}

/// The traffic of some pods; ends when it goes out of scope.
#[derive(Debug)]
pub struct Traffic {
    flows: Vec<(String, Arc<Flow>)>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// Starts all flows of these pods.
    pub(crate) fn start(pods: &[(String, Arc<Host>)]) -> Result<Traffic> {
        let mut traffic = Traffic {
            flows: Vec::new(),
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        };
        for (name, host) in pods {
            let flows: Vec<Arc<Flow>> = [Kind::Stream, Kind::Datagrams, Kind::Dials]
                .into_iter()
                .flat_map(|kind| Family::BOTH.map(|family| Flow::new(kind, family)))
                .collect();
            let named = flows.iter().map(|flow| (name.clone(), flow.clone()));
            traffic.flows.extend(named);
            let stop = traffic.stop.clone();
            let thread = host.inside(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build();
                let Ok(runtime) = runtime else {
                    return;
                };
                let local = tokio::task::LocalSet::new();
                local.block_on(&runtime, async {
                    for flow in flows {
                        // New connections to the neighbour, long ones to the far server.
                        let to = match flow.kind {
                            Kind::Dials => Outside::Lan,
                            Kind::Stream | Kind::Datagrams => Outside::Far,
                        };
                        tokio::task::spawn_local(flow.run(to));
                    }
                    while !stop.load(Ordering::Relaxed) {
                        sleep(PACE).await;
                    }
                });
            })?;
            traffic.threads.push(thread);
        }
        Ok(traffic)
    }

    /// Waits until every flow has come through within the last second, or has come to its end.
    ///
    /// # Errors
    /// With the first flow that hangs.
    pub fn wait_for_signs_of_life(&self) -> Result<()> {
        crate::eventually(HANGS, "all traffic flows", || {
            for (pod, flow) in &self.flows {
                let record = flow.record.lock().unwrap_or_else(PoisonError::into_inner);
                let is_alive = record.answers > 0 && record.last.elapsed() < ALIVE;
                if !is_alive && record.broken.is_none() {
                    bail!("{:?} {} of {pod} hangs", flow.kind, flow.family);
                }
            }
            Ok(Some(()))
        })
    }

    /// What every flow suffered since the last call. A broken one stays broken.
    #[must_use]
    pub fn take(&self) -> Vec<Suffered> {
        let flows = self.flows.iter();
        flows.map(|(pod, flow)| flow.take(pod)).collect()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic there was printed there.
            let _ = thread.join();
        }
    }
}
