//! A VIP that moves between nodes, looked at exhaustively: everything that may happen happens in every order.
//!
//! A pod keeps one TCP connection to a server outside. MetalLB moves the VIP, the agents learn of it when they do, and
//! execute the steps of real plans one by one; each may die in between, and begins again with what it finds. Packets are
//! in flight meanwhile, from the pod and from the server. In no state that can be reached may a packet arrive outside with
//! another address or port than the connection has; and from each, once nothing more happens, the connection goes on.
//!
//! What a node does with a pod's packet is the data path's model; connection tracking is as the kernel's was found to be
//! by experiment. One packet of each direction is in flight at a time, between any two steps; but it arrives, in
//! microseconds, before an agent has heard of a move and made its next plan, in milliseconds.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;

use metaleg::cluster::View;
use metaleg::diff::diff;
use metaleg::ethernet::Mac;
use metaleg::names::NodeName;
use metaleg::plan::plan;
use metaleg::plan::slots::Slots;
use metaleg::settings::ExcludedDestinations;
use metaleg::state::{ConnectionStep, Family, FamilyState, KernelState, Landmark, Step};

use crate::data_path::{Backend, Fate, Packet, Tracking, fate};
use crate::fixtures::{
    With, endpoint, ip, lan, net, node as node_fixture, service, settings_on, slice,
};

/// The pod's node: the first one.
const HOME: usize = 0;
const MOST_NODES: usize = 3;

/// What is taken out of the product, to see that it is missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Without {
    Nothing,
    /// Packets to a VIP that belong to no connection are dropped.
    Guard,
    /// Connections are forgotten when their translation changes.
    Forgetting,
    /// Connections are taken up by a node that is gateway again.
    Resuming,
    /// Late replies of forgotten connections are dropped, and what other nodes hand over.
    LateReplies,
    /// What other nodes hand over from outside begins nothing.
    Nodes,
    /// Connections to a VIP that nobody has answered are forgotten at a start.
    Unanswered,
    /// A gateway that hears that it was none for a while begins anew.
    Interruptions,
}

/// Who talks with whom.
#[derive(Clone, Copy, Debug)]
struct Ends {
    pod: IpAddr,
    vip: IpAddr,
    server: IpAddr,
}

impl Ends {
    fn of(family: Family) -> Ends {
        let [pod, vip, server] = match family {
            Family::V4 => ["10.244.1.11", "192.0.2.200", "198.51.100.10"],
            Family::V6 => ["fd00:10:244:1::11", "2001:db8:1::200", "2001:db8:2::10"],
        }
        .map(ip);
        Ends { pod, vip, server }
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carried {
    Tcp,
    /// Nobody knows windows, and whatever comes first begins a connection.
    Udp,
}

/// The course of events.
#[derive(Clone, Debug)]
struct Course {
    by: Backend,
    family: Family,
    carried: Carried,
    /// How often the pod's node loses its entry: others delete it, or it times out there alone.
    losses: u8,
    /// Who has the VIP, one after the other.
    announcers: &'static [usize],
    nodes: usize,
    /// A node that is booted with an empty kernel.
    booted: Option<usize>,
    deaths: u8,
    /// The server goes on to send to the announcer before, until its neighbour table is told.
    late_server: bool,
    without: Without,
}

/// What connection tracking of a node has of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Tracked {
    /// Opened by the pod.
    own: Option<Outbound>,
    /// Taken for one that the server opened to the pod itself: what the pod sends is an answer.
    inbound: bool,
    /// Taken for one that the server opened to the VIP, and that nobody answers: it has the pod's port.
    unanswered: bool,
    /// The connection was forgotten, and late replies to the pod are expected.
    late: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Outbound {
    source: IpAddr,
    /// The pod's port was taken.
    other_port: bool,
    /// A packet of the server came by here: without one, nobody knows a window that the pod could be outside of.
    answered: bool,
    /// Packets of the server have reached the pod through another node since: what the pod acknowledges is unknown here,
    /// and outside of the window. What the pod alone has sent elsewhere fits in.
    stale: bool,
    /// Taken up anew: nobody looks at windows any more.
    resumed: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Member {
    /// How many moves its agent knows of.
    knows: usize,
    kernel: usize,
    /// A list of steps, and how many of them are done.
    pending: Option<(usize, usize)>,
    /// The kernel was what it should be since the node was booted.
    programmed: bool,
    tracked: Tracked,
}

/// Where a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum FromPod {
    /// About to enter a node, with this source.
    At(usize, IpAddr),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum FromServer {
    /// To the VIP, about to enter a node.
    ToVip(usize),
    /// To the pod, about to enter its node; this node has translated it.
    ToPod(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct World {
    /// How often the VIP has moved.
    moves: usize,
    /// How many moves the server's neighbour table knows of.
    server_knows: usize,
    deaths: u8,
    losses: u8,
    /// As many as the course has nodes; the others do nothing.
    members: [Member; MOST_NODES],
    from_pod: Option<FromPod>,
    from_server: Option<FromServer>,
    /// The server knows the connection.
    open: bool,
}

/// Plans and kernels by number: there are few, and many worlds.
struct Model {
    course: Course,
    kernels: Vec<KernelState>,
    lists: Vec<Vec<Step>>,
    /// The steps from a kernel, in doubt or not, of a node that knows an announcer.
    plans: HashMap<(usize, usize, usize, bool), usize>,
    /// The kernel after a step of a list.
    stepped: HashMap<(usize, usize, usize), usize>,
    /// The kernel that is taken for interrupted.
    interruptions: HashMap<usize, usize>,
    /// What becomes of a pod's packet, by kernel.
    fates: RefCell<HashMap<(usize, IpAddr, Tracking), Fate>>,
}

/// What happens next; its words are made for those alone that led to a violation.
#[derive(Clone, Copy, Debug)]
enum Event {
    Begin,
    Move,
    ServerLearns,
    Start(usize),
    Learn(usize),
    Step(usize, usize, usize),
    Death(usize),
    Loss,
    PodSends,
    FromPod(usize, IpAddr),
    ServerSends,
    ToVip(usize),
    ToPod,
}

/// What must not happen, in words.
type Violation = &'static str;

fn node(n: usize) -> NodeName {
    NodeName(format!("node{}", n + 1))
}

fn address(family: Family, n: usize) -> IpAddr {
    match family {
        Family::V4 => ip(&format!("192.0.2.{}", 11 + n)),
        Family::V6 => ip(&format!("2001:db8:1::{}", 11 + n)),
    }
}

fn mac(n: usize) -> Mac {
    Mac([2, 0, 0, 0, 0, u8::try_from(n).unwrap()])
}

fn view(course: &Course, announcer: usize) -> View {
    let nodes = (0..course.nodes).map(|n| {
        let net = match course.family {
            Family::V4 => format!("10.244.{}.0/24", n + 1),
            Family::V6 => format!("fd00:10:244:{}::/64", n + 1),
        };
        node_fixture(&node(n).0)
            .address(&address(course.family, n).to_string())
            .pod_net(&net)
    });
    let ends = Ends::of(course.family);
    let shop = service("shop")
        .families(&[course.family])
        .vip(&ends.vip.to_string());
    let neighbours = (0..course.nodes).map(|n| (address(course.family, n), mac(n)));
    let are_known = ![Without::Nodes, Without::LateReplies].contains(&course.without);
    let view = View {
        traits: course.by.traits(),
        interfaces: vec![lan()],
        neighbours: neighbours.filter(|_| are_known).collect(),
        ..View::default()
    };
    nodes
        .fold(view, With::with)
        .with(shop.announced_by(&node(announcer).0))
        .with(slice(
            "shop",
            "shop",
            [endpoint(&ends.pod.to_string(), &node(HOME).0)],
        ))
}

impl Model {
    fn new(course: Course) -> (Model, World) {
        let mut model = Model {
            course,
            kernels: Vec::new(),
            lists: Vec::new(),
            plans: HashMap::new(),
            stepped: HashMap::new(),
            interruptions: HashMap::new(),
            fates: RefCell::default(),
        };
        let first = model.course.announcers[0];
        let family = model.course.family;
        let mut members = [Member::default(); MOST_NODES];
        for (n, member) in members.iter_mut().enumerate().take(model.course.nodes) {
            let booted = model.course.booted == Some(n);
            let kernel = match booted {
                true => nothing(family),
                false => model.desired(n, first, &nothing(family)),
            };
            member.kernel = model.kernel(kernel);
            member.programmed = !booted;
        }
        let world = World {
            moves: 0,
            server_knows: 0,
            deaths: 0,
            losses: 0,
            members,
            from_pod: None,
            from_server: None,
            open: false,
        };
        (model, world)
    }

    fn kernel(&mut self, state: KernelState) -> usize {
        if let Some(known) = self.kernels.iter().position(|known| *known == state) {
            return known;
        }
        self.kernels.push(state);
        self.kernels.len() - 1
    }

    fn desired(&self, n: usize, announcer: usize, kernel: &KernelState) -> KernelState {
        let mut settings = settings_on(&node(n).0);
        // One network: with iptables each is a step for each table, and every step makes worlds.
        let inside = ["10.244.0.0/16", "fd00:10:244::/48"];
        settings.excluded = ExcludedDestinations {
            auto: false,
            listed: inside.map(net).into(),
        };
        let slots = Slots::adopt(kernel, &settings);
        let view = view(&self.course, announcer);
        plan(&view, &settings, &[self.course.family].into(), &slots).kernel
    }

    /// The steps to what a node should be.
    fn steps(&mut self, n: usize, member: Member, doubt: bool) -> usize {
        let announcer = self.course.announcers[member.knows];
        let place = (n, member.kernel, announcer, doubt);
        if let Some(known) = self.plans.get(&place) {
            return *known;
        }
        let observed = KernelState {
            doubt,
            ..self.kernels[member.kernel].clone()
        };
        let steps = diff(&observed, &self.desired(n, announcer, &observed));
        self.lists.push(steps);
        self.plans.insert(place, self.lists.len() - 1);
        self.lists.len() - 1
    }

    fn state(&self, member: &Member) -> &FamilyState {
        &self.kernels[member.kernel].families[&self.course.family]
    }

    fn ends(&self) -> Ends {
        Ends::of(self.course.family)
    }

    /// Whether a node drops what another one hands over from outside, unless it begins a connection.
    fn knows(&self, member: &Member, other: usize) -> bool {
        let landmark = Landmark::Node(mac(other));
        self.state(member).firewall.landmarks.contains(&landmark)
    }

    fn announcer(&self, world: &World) -> usize {
        self.course.announcers[world.moves]
    }

    /// Everything that may happen next.
    fn next(&mut self, world: &World) -> Vec<(Event, Result<World, Violation>)> {
        let mut all = Vec::new();
        if world.moves + 1 < self.course.announcers.len() {
            let mut next = *world;
            next.moves += 1;
            if !self.course.late_server {
                next.server_knows = next.moves;
            }
            all.push((Event::Move, Ok(next)));
        }
        if world.server_knows < world.moves {
            let mut next = *world;
            next.server_knows = world.moves;
            all.push((Event::ServerLearns, Ok(next)));
        }
        let announcer = self.announcer(world);
        let in_flight = world.from_pod.is_some() || world.from_server.is_some();
        for n in 0..self.course.nodes {
            let member = world.members[n];
            // Others go to a node when it is programmed; it goes to itself at once.
            let is_usable = n == announcer || world.members[announcer].programmed;
            match member.pending {
                None if !member.programmed => {
                    let mut next = *world;
                    next.members[n].knows = world.moves;
                    all.push((Event::Start(n), Ok(self.start(&next, n))));
                }
                None if member.knows != world.moves && is_usable && !in_flight => {
                    let mut next = *world;
                    next.members[n].knows = world.moves;
                    if self.course.announcers[member.knows] == announcer {
                        next.members[n].kernel = self.interrupted(member.kernel);
                    }
                    let list = self.steps(n, next.members[n], false);
                    next.members[n].pending = Some((list, 0));
                    all.push((Event::Learn(n), Ok(next)));
                }
                None => {}
                Some((list, done)) => {
                    let next = self.step(world, n, list, done);
                    all.push((Event::Step(n, list, done), Ok(next)));
                    if world.deaths < self.course.deaths {
                        let mut next = *world;
                        next.deaths += 1;
                        all.push((Event::Death(n), Ok(self.start(&next, n))));
                    }
                }
            }
        }
        if world.losses < self.course.losses && world.members[HOME].tracked.own.is_some() {
            let mut next = *world;
            next.losses += 1;
            next.members[HOME].tracked.own = None;
            all.push((Event::Loss, Ok(next)));
        }
        match world.from_pod {
            None => {
                let mut next = *world;
                next.from_pod = Some(FromPod::At(HOME, self.ends().pod));
                all.push((Event::PodSends, Ok(next)));
            }
            Some(FromPod::At(n, source)) => {
                all.push((Event::FromPod(n, source), self.out(world, n, source)));
            }
        }
        match world.from_server {
            None if world.open => {
                let mut next = *world;
                let to = self.course.announcers[world.server_knows];
                next.from_server = Some(FromServer::ToVip(to));
                all.push((Event::ServerSends, Ok(next)));
            }
            None => {}
            Some(FromServer::ToVip(n)) => all.push((Event::ToVip(n), Ok(self.to_vip(world, n).0))),
            Some(FromServer::ToPod(via)) => all.push((Event::ToPod, Ok(self.to_pod(world, via).0))),
        }
        all
    }

    fn words(&self, event: Event) -> String {
        match event {
            Event::Begin => String::new(),
            Event::Move => "the VIP moves on".to_owned(),
            Event::ServerLearns => "the server learns of it".to_owned(),
            Event::Start(n) => format!("{} starts", node(n)),
            Event::Learn(n) => format!("{} learns of it", node(n)),
            Event::Step(n, list, done) => {
                let step = self.lists[list].get(done).map(Step::to_string);
                format!("{}: {}", node(n), step.unwrap_or_default())
            }
            Event::Death(n) => format!("{} dies, and starts again", node(n)),
            Event::Loss => "the pod's node loses its entry".to_owned(),
            Event::PodSends => "the pod sends".to_owned(),
            Event::FromPod(n, source) => format!("{} gets the pod's packet as {source}", node(n)),
            Event::ServerSends => "the server sends".to_owned(),
            Event::ToVip(n) => format!("{} gets the server's packet to the VIP", node(n)),
            Event::ToPod => "the pod's node gets the server's packet".to_owned(),
        }
    }

    /// The kernel as it is taken for when the node has heard that it was not the gateway for a while.
    fn interrupted(&mut self, kernel: usize) -> usize {
        if self.course.without == Without::Interruptions {
            return kernel;
        }
        if let Some(known) = self.interruptions.get(&kernel) {
            return *known;
        }
        let mut state = self.kernels[kernel].clone();
        state.interrupt(&[self.ends().vip].into());
        let interrupted = self.kernel(state);
        self.interruptions.insert(kernel, interrupted);
        interrupted
    }

    /// What a step makes of a kernel.
    fn stepped(&mut self, kernel: usize, list: usize, done: usize) -> usize {
        let place = (kernel, list, done);
        if let Some(known) = self.stepped.get(&place) {
            return *known;
        }
        let mut state = self.kernels[kernel].clone();
        if let Some(step) = self.lists[list].get(done) {
            state.apply(step);
            state.doubt = false;
        }
        let stepped = self.kernel(state);
        self.stepped.insert(place, stepped);
        stepped
    }

    fn start(&mut self, world: &World, n: usize) -> World {
        let mut next = *world;
        next.members[n].kernel = self.interrupted(next.members[n].kernel);
        let list = self.steps(n, next.members[n], true);
        next.members[n].pending = Some((list, 0));
        next
    }

    fn step(&mut self, world: &World, n: usize, list: usize, done: usize) -> World {
        let mut next = *world;
        let kernel = self.stepped(world.members[n].kernel, list, done);
        let member = &mut next.members[n];
        if let Some(step) = self.lists[list].get(done) {
            forget(&mut member.tracked, step, &self.course);
        }
        member.kernel = kernel;
        let is_last = done + 1 >= self.lists[list].len();
        member.pending = (!is_last).then_some((list, done + 1));
        member.programmed |= is_last;
        next
    }

    /// A packet of the pod enters a node.
    fn out(&self, world: &World, n: usize, source: IpAddr) -> Result<World, Violation> {
        let Ends { vip, server, .. } = self.ends();
        let mut next = *world;
        next.from_pod = None;
        let member = &mut next.members[n];
        let tracked = member.tracked;
        let tracking = match tracked.own {
            _ if tracked.inbound => Tracking::Reply,
            Some(own) if own.stale && !own.resumed => Tracking::Invalid,
            Some(own) => Tracking::Established(own.source),
            None => Tracking::New,
        };
        let mut fates = self.fates.borrow_mut();
        let place = (member.kernel, source, tracking);
        let fate = *fates.entry(place).or_insert_with(|| {
            let packet = Packet {
                source,
                host: false,
                destination: server,
                tracking,
            };
            fate(self.course.by, self.state(member), &packet)
        });
        let (Fate::Direct(leaves) | Fate::ToGateway { source: leaves, .. }) = fate else {
            return Ok(next);
        };
        if tracking == Tracking::New {
            member.tracked.own = Some(Outbound {
                source: leaves,
                other_port: leaves == vip && tracked.unanswered,
                answered: false,
                stale: false,
                resumed: false,
            });
        }
        let other_port = member.tracked.own.is_some_and(|own| own.other_port);
        match fate {
            Fate::ToGateway { via, .. } => {
                let gateway =
                    (0..self.course.nodes).find(|n| address(self.course.family, *n) == via);
                next.from_pod = gateway.map(|gateway| FromPod::At(gateway, leaves));
                Ok(next)
            }
            _ if leaves != vip => Err("a packet leaves with another address than the VIP"),
            _ if next.open && other_port => Err("the connection has another port"),
            _ => {
                next.open = true;
                Ok(next)
            }
        }
    }

    /// A packet of the server to the VIP enters a node; also whether it is on its way to the pod, or there.
    fn to_vip(&self, world: &World, n: usize) -> (World, bool) {
        let vip = self.ends().vip;
        let mut next = *world;
        next.from_server = None;
        let is_guarded = self.course.without != Without::Guard
            && self.state(&next.members[n]).firewall.vips.contains(&vip);
        let tracked = &mut next.members[n].tracked;
        if let Some(own) = &mut tracked.own {
            own.answered |= own.source == vip;
        }
        match tracked.own {
            Some(own) if own.source == vip && n == HOME => {
                self.outdate(&mut next, n);
                (next, true)
            }
            Some(own) if own.source == vip => {
                next.from_server = Some(FromServer::ToPod(n));
                (next, true)
            }
            _ => {
                // Routed to an address that nobody has; the entry stays.
                tracked.unanswered |= !is_guarded;
                (next, false)
            }
        }
    }

    /// A packet of the server to the pod itself enters the pod's node; also whether it arrives.
    fn to_pod(&self, world: &World, via: usize) -> (World, bool) {
        let mut next = *world;
        next.from_server = None;
        let is_known = self.knows(&next.members[HOME], via);
        let tracked = &mut next.members[HOME].tracked;
        let arrives = match tracked.own {
            Some(own) => own.source == self.ends().pod,
            None if tracked.late || is_known => false,
            None => {
                tracked.inbound = true;
                true
            }
        };
        if arrives {
            self.outdate(&mut next, via);
        }
        (next, arrives)
    }

    /// The pod has got a packet through a node: what other gateways know of the connection is old.
    fn outdate(&self, world: &mut World, via: usize) {
        let vip = self.ends().vip;
        for (n, member) in world.members.iter_mut().enumerate() {
            if let Some(own) = &mut member.tracked.own
                && n != via
                && own.source == vip
            {
                own.stale |= own.answered && self.course.carried == Carried::Tcp;
            }
        }
    }

    /// When nothing more happens and all agents have done their work: the pod's packet reaches the server, and the
    /// server's reaches the pod.
    fn goes_on(&self, world: &World) -> Result<(), Violation> {
        let announcer = self.announcer(world);
        let is_settled = |m: &Member| m.knows == world.moves && m.pending.is_none() && m.programmed;
        let in_flight = world.from_pod.is_some() || world.from_server.is_some();
        let knows_all = world.server_knows == world.moves;
        let mut members = world.members.iter().take(self.course.nodes);
        if in_flight || !knows_all || !members.all(is_settled) {
            return Ok(());
        }
        let mut now = *world;
        now.from_pod = Some(FromPod::At(HOME, self.ends().pod));
        now.open = false;
        while let Some(FromPod::At(n, source)) = now.from_pod {
            now = self.out(&now, n, source)?;
        }
        if !now.open {
            return Err("the pod's packets do not arrive");
        }
        let (mut now, mut arrives) = self.to_vip(&now, announcer);
        while arrives && let Some(FromServer::ToPod(via)) = now.from_server {
            (now, arrives) = self.to_pod(&now, via);
        }
        match arrives {
            true => Ok(()),
            false => Err("the server's packets do not arrive"),
        }
    }
}

fn nothing(family: Family) -> KernelState {
    KernelState {
        families: [(family, FamilyState::default())].into(),
        ..KernelState::default()
    }
}

fn forget(tracked: &mut Tracked, step: &Step, course: &Course) {
    let (without, ends) = (course.without, Ends::of(course.family));
    let forgets = match step {
        Step::Connection(ConnectionStep::Forget(_)) => without != Without::Forgetting,
        Step::Connection(ConnectionStep::Resume { source, .. }) => {
            if let Some(own) = &mut tracked.own {
                own.resumed |= without != Without::Resuming;
            }
            tracked.own.is_some_and(|own| own.source != *source)
        }
        Step::Connection(ConnectionStep::ForgetWrongSource { sources, vips, .. }) => {
            let is_unanswered = without != Without::Unanswered && vips.contains(&ends.vip);
            tracked.unanswered &= !is_unanswered;
            let wanted = sources.get(&ends.pod);
            wanted.is_some_and(|wanted| tracked.own.is_some_and(|own| own.source != *wanted))
        }
        _ => false,
    };
    if let Some(own) = tracked.own.filter(|_| forgets) {
        tracked.own = None;
        tracked.late |= own.source == ends.pod && without != Without::LateReplies;
    }
}

/// Looks at every world that can be reached; the events that lead to the first one that must not be.
fn explore(course: Course) -> Result<usize, String> {
    let (mut model, first) = Model::new(course);
    let mut seen: HashSet<World> = [first].into();
    let mut trail: Vec<(usize, Event)> = vec![(0, Event::Begin)];
    let mut ahead: VecDeque<(World, usize)> = [(first, 0)].into();
    let told = |model: &Model, trail: &[(usize, Event)], mut at: usize, what: &str| {
        let mut events = vec![what.to_owned()];
        while at != 0 {
            events.push(model.words(trail[at].1));
            at = trail[at].0;
        }
        events.reverse();
        events.join("\n")
    };
    while let Some((world, at)) = ahead.pop_front() {
        if let Err(violation) = model.goes_on(&world) {
            return Err(told(&model, &trail, at, violation));
        }
        for (event, next) in model.next(&world) {
            let next = match next {
                Ok(next) => next,
                Err(violation) => {
                    trail.push((at, event));
                    return Err(told(&model, &trail, trail.len() - 1, violation));
                }
            };
            if seen.insert(next) {
                ahead.push_back((next, trail.len()));
                trail.push((at, event));
            }
        }
    }
    Ok(seen.len())
}

/// The pod's node gets the VIP and loses it, other nodes hand it over, a gateway is booted.
fn courses(by: Backend, without: Without) -> Vec<Course> {
    let course = |announcers: &'static [usize], nodes, booted, deaths, late_server| Course {
        by,
        family: Family::V4,
        carried: Carried::Tcp,
        losses: 0,
        announcers,
        nodes,
        booted,
        deaths,
        late_server,
        without,
    };
    vec![
        course(&[0, 1], 2, None, 1, true),
        course(&[1, 0], 2, None, 1, true),
        course(&[0, 1, 0], 2, None, 1, false),
        course(&[1, 0, 1], 2, None, 1, false),
        course(&[0, 1, 0], 2, None, 0, true),
        course(&[1, 0, 1], 2, None, 0, true),
        course(&[1, 2], 3, None, 1, false),
        course(&[1, 2, 1], 3, None, 0, false),
        course(&[1, 2], 3, Some(2), 0, true),
        course(&[0, 1], 2, Some(1), 1, true),
    ]
}

/// The same with datagrams, with IPv6, with entries that are lost, and by the other backend; as little of it as makes a
/// difference.
fn other_courses(without: Without) -> Vec<Course> {
    let all = || courses(Backend::Nftables, without).into_iter();
    let short = || all().filter(|course| course.announcers.len() == 2 && course.nodes == 2);
    let of_udp = short().map(|course| Course {
        carried: Carried::Udp,
        deaths: 0,
        losses: 1,
        ..course
    });
    let of_tcp = short().map(|course| Course {
        deaths: 0,
        losses: 1,
        ..course
    });
    let of_v6 = short().map(|course| Course {
        family: Family::V6,
        ..course
    });
    let of_iptables = courses(Backend::Iptables, without).into_iter();
    let of_iptables =
        of_iptables.filter(|course| course.announcers.len() == 2 && course.nodes == 2);
    let others = of_udp.chain(of_tcp).chain(of_v6);
    others.chain(of_iptables).collect()
}

#[test]
fn i1_i6_no_order_of_events_leaks_and_every_run_ends_continuous() {
    let all = courses(Backend::Nftables, Without::Nothing).into_iter();
    for course in all.chain(other_courses(Without::Nothing)) {
        match explore(course.clone()) {
            Ok(worlds) => println!("{worlds} worlds: {course:?}"),
            Err(events) => panic!("{course:?}\n{events}"),
        }
    }
}

#[test]
fn what_is_taken_out_is_missed() {
    for without in [
        Without::Guard,
        Without::Forgetting,
        Without::Resuming,
        Without::LateReplies,
        Without::Nodes,
        Without::Unanswered,
        Without::Interruptions,
    ] {
        let courses = courses(Backend::Nftables, without).into_iter();
        let mut courses = courses.chain(other_courses(without));
        let violation = courses.find_map(|course| explore(course).err());
        println!(
            "without {without:?}:\n{}\n",
            violation.unwrap_or_else(|| panic!("nobody misses {without:?}"))
        );
    }
}
