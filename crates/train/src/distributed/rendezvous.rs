//! How ranks find each other: rank 0 listens at MASTER_ADDR:MASTER_PORT, the others connect, everyone says who it is.
//!
//! Rank 0 compares what has to be the same for all, waits until all are there, hands out what it has for all (on GPUs the
//! id of the communicator), and keeps the connections as the [control plane](super::control). A stranger that connects is
//! ignored, a process of another run is refused by what differs. The connection is neither encrypted nor authenticated:
//! like torchrun's, it belongs into a network that one trusts.

use super::control::{Control, Timeouts};
use super::frame::{self, Hello, MAGIC, Message, PROTOCOL};
use super::launch::{Launch, Master};
use super::{CommunicatorError, Ranks, Result};
use crate::signal::StopFlag;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// What a rank brings to the meeting.
#[derive(Debug, Clone, Default)]
pub(crate) struct Luggage<'a> {
    /// Name and value of everything that has to be the same for all ranks.
    pub(crate) identity: &'a [(String, String)],
    /// Unique among all GPUs; `None` on a CPU.
    pub(crate) device: Option<String>,
    /// What rank 0 has for all; ignored on other ranks.
    pub(crate) for_all: Vec<u8>,
    /// Ends the wait for the others; by default nothing does.
    pub(crate) stop: StopFlag,
}

/// Who came.
#[derive(Debug)]
pub(crate) struct Met {
    pub(crate) control: Control,
    /// By rank.
    pub(crate) hosts: Vec<String>,
    /// What rank 0 brought for all.
    pub(crate) for_all: Vec<u8>,
}

/// Time for a process that has connected to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(10);
/// Time between two looks for something new.
const POLL: Duration = Duration::from_millis(5);
/// Time between two tries to connect.
const RETRY: Duration = Duration::from_millis(200);

/// Meets all other ranks.
///
/// # Errors
/// If they do not all come in time (naming the missing ones), differ in their identity, share a GPU, the address cannot be
/// used, or the luggage's flag says stop.
pub(crate) fn meet(launch: &Launch, master: &Master, luggage: Luggage<'_>, timeouts: Timeouts) -> Result<Met> {
    if launch.rank == 0 {
        let listener = listen(launch, master)?;
        return receive(launch, master, listener, luggage, timeouts);
    }
    Party { launch, master, timeouts }.join(luggage)
}

/// Opens rank 0's port: only for this machine if all ranks are on it, else for all of its addresses.
fn listen(launch: &Launch, master: &Master) -> Result<TcpListener> {
    let party = Party { launch, master, timeouts: Timeouts::default() };
    let resolved = party.resolve();
    let is_v6 = resolved.as_ref().is_ok_and(|found| found.iter().all(SocketAddr::is_ipv6));
    let only_here = launch.local_ranks == Some(launch.ranks);
    let address: IpAddr = match (only_here, is_v6) {
        (true, true) => Ipv6Addr::LOCALHOST.into(),
        // Not 127.0.0.1 if the ranks will look for another address of this machine.
        (true, false) if resolved.is_ok_and(|found| found.iter().any(|a| a.ip().is_loopback())) => {
            Ipv4Addr::LOCALHOST.into()
        }
        (_, true) => Ipv6Addr::UNSPECIFIED.into(),
        (_, false) => Ipv4Addr::UNSPECIFIED.into(),
    };
    TcpListener::bind((address, master.port)).map_err(|cause| {
        let hint = match cause.kind() {
            io::ErrorKind::AddrInUse => {
                "; another run may use it: set MASTER_PORT to a free one, the same for all ranks"
            }
            io::ErrorKind::PermissionDenied => "; ports below 1024 are not for everyone",
            _ => "",
        };
        party.error(format!("rank 0 cannot listen on port {}: {cause}{hint}", master.port))
    })
}

/// Rank 0's side.
pub(super) fn receive(
    launch: &Launch,
    master: &Master,
    listener: TcpListener,
    luggage: Luggage<'_>,
    timeouts: Timeouts,
) -> Result<Met> {
    let party = Party { launch, master, timeouts };
    let end = Instant::now() + timeouts.start;
    let own = party.hello(&luggage);
    let mut guests: Vec<Option<(Hello, TcpStream)>> = (0..launch.ranks).map(|_| None).collect();
    listener.set_nonblocking(true).map_err(|cause| party.error(cause.to_string()))?;
    let (tell, told) = mpsc::channel();
    while !are_there(&mut guests) {
        match listener.accept() {
            Ok((stream, address)) => {
                // A stranger that says nothing must not keep the others waiting.
                let tell = tell.clone();
                thread::spawn(move || match introduce(stream) {
                    // The receiver is gone if the meeting is over.
                    Ok(guest) => drop(tell.send(guest)),
                    Err(why) => tracing::warn!("rendezvous: ignored a connection from {address}: {why}"),
                });
            }
            Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => thread::sleep(POLL),
            // A connection that ended before it was taken, or no more file descriptors for a moment.
            Err(cause) => {
                tracing::warn!("rendezvous: {cause}");
                thread::sleep(RETRY);
            }
        }
        while let Ok((hello, stream)) = told.try_recv() {
            if let Err(why) = party.compare(&own, &hello, &guests) {
                let _ = frame::write(&mut &stream, &Message::Refused { why: why.clone() }, &[]);
                return Err(party.refuse(&mut guests, why));
            }
            let rank = hello.rank;
            guests[rank] = Some((hello, stream));
        }
        if let Err(why) = go_on(&luggage.stop) {
            return Err(party.refuse(&mut guests, format!("rank 0 was {why}")));
        }
        if Instant::now() > end {
            let missing = Ranks((1..launch.ranks).filter(|&rank| guests[rank].is_none()).collect());
            let here = guests.iter().flatten().map(|(hello, _)| format!("rank {} on {}", hello.rank, hello.host));
            let here: Vec<String> = std::iter::once(format!("rank 0 on {}", own.host)).chain(here).collect();
            let seconds = timeouts.start.as_secs_f64();
            let why = format!("{missing} did not come within {seconds:.1} s; there are {}", here.join(", "));
            return Err(party.refuse(&mut guests, why));
        }
    }
    let hosts: Vec<String> =
        std::iter::once(own.host).chain(guests.iter().flatten().map(|(hello, _)| hello.host.clone())).collect();
    let mut links = vec![None];
    for (rank, guest) in guests.iter_mut().enumerate().skip(1) {
        let Some((_, stream)) = guest.take() else { continue };
        let welcome = Message::Welcome { hosts: hosts.clone() };
        frame::write(&mut &stream, &welcome, &luggage.for_all)
            .map_err(|cause| party.error(format!("rank {rank} left during the start: {cause}")))?;
        links.push(Some(stream));
    }
    let control = Control::start(0, launch.ranks, links, timeouts).map_err(|cause| party.error(cause.to_string()))?;
    Ok(Met { control, hosts, for_all: luggage.for_all })
}

/// Reads who has connected.
fn introduce(mut stream: TcpStream) -> std::result::Result<(Hello, TcpStream), String> {
    let mut exchange = || -> io::Result<(Hello, ())> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(INTRODUCTION))?;
        stream.set_write_timeout(Some(INTRODUCTION))?;
        stream.write_all(&MAGIC)?;
        let mut magic = [0; MAGIC.len()];
        stream.read_exact(&mut magic)?;
        let stranger = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        if magic != MAGIC {
            return Err(stranger(format!("it began with {:?}", String::from_utf8_lossy(&magic))));
        }
        match frame::read(&mut stream)? {
            (Message::Hello(hello), _) => Ok((hello, ())),
            (other, _) => Err(stranger(format!("it began with {other:?}"))),
        }
    };
    let (hello, ()) = exchange().map_err(|cause| cause.to_string())?;
    Ok((hello, stream))
}

/// Whether all ranks but 0 are there; those that came and died are forgotten, since they may be started again.
fn are_there(guests: &mut [Option<(Hello, TcpStream)>]) -> bool {
    let others = &mut guests[1..];
    if others.iter().all(Option::is_some) {
        for guest in others.iter_mut() {
            let ended = guest.take_if(|(_, stream)| has_ended(stream));
            if let Some((hello, _)) = ended {
                tracing::warn!("rendezvous: rank {} on {} came and died; waiting for it again", hello.rank, hello.host);
            }
        }
    }
    others.iter().all(Option::is_some)
}

/// Whether the other end has closed a connection on which nothing is due.
fn has_ended(stream: &TcpStream) -> bool {
    let alive = |cause: io::Error| cause.kind() == io::ErrorKind::WouldBlock;
    let ended = stream.set_nonblocking(true).is_err() || !stream.peek(&mut [0]).map_or_else(alive, |bytes| bytes > 0);
    ended || stream.set_nonblocking(false).is_err()
}

/// A meeting as one rank sees it.
#[derive(Clone, Copy)]
struct Party<'a> {
    launch: &'a Launch,
    master: &'a Master,
    timeouts: Timeouts,
}

impl Party<'_> {
    fn error(self, why: String) -> CommunicatorError {
        CommunicatorError::Rendezvous { rank: self.launch.rank, master: self.master.clone(), why }
    }

    fn hello(self, luggage: &Luggage<'_>) -> Hello {
        Hello {
            protocol: PROTOCOL,
            rank: self.launch.rank,
            ranks: self.launch.ranks,
            host: host_name(),
            device: luggage.device.clone(),
            identity: luggage.identity.to_vec(),
        }
    }

    fn resolve(self) -> io::Result<Vec<SocketAddr>> {
        let found: Vec<_> = (self.master.host.as_str(), self.master.port).to_socket_addrs()?.collect();
        if found.is_empty() { Err(io::Error::other("the name has no address")) } else { Ok(found) }
    }

    /// Tells those who are there that there will be no run.
    fn refuse(self, guests: &mut [Option<(Hello, TcpStream)>], why: String) -> CommunicatorError {
        for (_, stream) in guests.iter_mut().flatten() {
            let _ = frame::write(stream, &Message::Refused { why: why.clone() }, &[]);
        }
        self.error(why)
    }

    /// Whether a rank belongs to this run.
    fn compare(
        self,
        own: &Hello,
        hello: &Hello,
        guests: &[Option<(Hello, TcpStream)>],
    ) -> std::result::Result<(), String> {
        let who = format!("rank {} on {}", hello.rank, hello.host);
        if hello.protocol != own.protocol {
            let (theirs, mine) = (hello.protocol, own.protocol);
            return Err(format!("{who} speaks version {theirs} of the protocol, rank 0 version {mine}: another build"));
        }
        if hello.ranks != own.ranks || hello.rank == 0 || hello.rank >= own.ranks {
            let (theirs, mine) = (hello.ranks, own.ranks);
            return Err(format!("{who} was started as one of {theirs} ranks, rank 0 as one of {mine}"));
        }
        let of = |hello: &Hello, name: &str| {
            let value = hello.identity.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
            value.unwrap_or_else(|| "none".to_owned())
        };
        for (name, _) in own.identity.iter().chain(&hello.identity) {
            let (theirs, mine) = (of(hello, name), of(own, name));
            if theirs != mine {
                return Err(format!("{who} has another {name} than rank 0 on {}: {theirs}, not {mine}", own.host));
            }
        }
        for (other, stream) in guests.iter().flatten().map(|(other, stream)| (other, Some(stream))).chain([(own, None)])
        {
            if other.rank == hello.rank {
                // A process that was started again takes the place of the one that ended.
                if stream.is_none_or(|stream| !has_ended(stream)) {
                    return Err(format!(
                        "two processes are rank {}: on {} and on {}",
                        hello.rank, other.host, hello.host
                    ));
                }
            } else if hello.device.is_some() && hello.device == other.device {
                let device = hello.device.as_deref().unwrap_or_default();
                return Err(format!(
                    "{who} and rank {} on {} use the same GPU ({device}); each rank needs its own",
                    other.rank, other.host
                ));
            }
        }
        Ok(())
    }

    /// The side of all other ranks.
    fn join(self, luggage: Luggage<'_>) -> Result<Met> {
        let end = Instant::now() + self.timeouts.start;
        let mut stream = self.connect(end, &luggage.stop)?;
        // Rank 0 may have come later, and its message says who is missing.
        let patience = end.saturating_duration_since(Instant::now()) + self.timeouts.start + INTRODUCTION;
        let mut introduce = || -> io::Result<(Message, Vec<u8>)> {
            stream.set_nodelay(true)?;
            stream.set_write_timeout(Some(INTRODUCTION))?;
            stream.set_read_timeout(Some(INTRODUCTION))?;
            stream.write_all(&MAGIC)?;
            frame::write(&mut stream, &Message::Hello(self.hello(&luggage)), &[])?;
            let mut magic = [0; MAGIC.len()];
            stream.read_exact(&mut magic)?;
            if magic != MAGIC {
                let start = String::from_utf8_lossy(&magic).into_owned();
                return Err(io::Error::other(format!(
                    "another program is there, its answer begins with {start:?}: is MASTER_PORT right?"
                )));
            }
            wait_for_words(&stream, patience, &luggage.stop)?;
            stream.set_read_timeout(Some(INTRODUCTION))?;
            frame::read(&mut stream)
        };
        match introduce() {
            Ok((Message::Welcome { hosts }, for_all)) => {
                let links = std::iter::once(Some(stream)).chain((1..self.launch.ranks).map(|_| None)).collect();
                let control = Control::start(self.launch.rank, self.launch.ranks, links, self.timeouts)
                    .map_err(|cause| self.error(cause.to_string()))?;
                Ok(Met { control, hosts, for_all })
            }
            Ok((Message::Refused { why }, _)) => Err(self.error(why)),
            Ok((other, _)) => Err(self.error(format!("rank 0 answered with {other:?}"))),
            Err(cause) => Err(self.error(match cause.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    "the connection was taken, but rank 0 does not answer: is another program on that port?".to_owned()
                }
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    "the connection was closed before all ranks were there: rank 0 ended, or another program is on that \
                     port"
                        .to_owned()
                }
                _ => cause.to_string(),
            })),
        }
    }

    /// Tries until rank 0 listens; it may be started later.
    fn connect(self, end: Instant, stop: &StopFlag) -> Result<TcpStream> {
        loop {
            go_on(stop).map_err(|why| self.error(why))?;
            let tried = self.resolve().and_then(|addresses| {
                let mut last = io::Error::other("no address");
                for address in addresses {
                    let left = end.saturating_duration_since(Instant::now());
                    match TcpStream::connect_timeout(&address, left.clamp(RETRY, INTRODUCTION)) {
                        Ok(stream) => return Ok(stream),
                        Err(cause) => last = io::Error::new(cause.kind(), format!("{address}: {cause}")),
                    }
                }
                Err(last)
            });
            match tried {
                Ok(stream) => return Ok(stream),
                Err(cause) if Instant::now() + RETRY > end => {
                    let Master { host, port } = self.master;
                    return Err(self.error(format!(
                        "no connection to rank 0 within {:.1} s ({cause}): is rank 0 running, and are MASTER_ADDR={host} \
                         and MASTER_PORT={port} its own?",
                        self.timeouts.start.as_secs_f64()
                    )));
                }
                Err(_) => thread::sleep(RETRY),
            }
        }
    }
}

/// Says as an error that the wait is to end, if it is.
fn go_on(stop: &StopFlag) -> std::result::Result<(), String> {
    match stop.cause() {
        None => Ok(()),
        Some(cause) => Err(format!("stopped by {cause} before all ranks were there")),
    }
}

/// Waits until the other end says something or closes the connection.
fn wait_for_words(stream: &TcpStream, patience: Duration, stop: &StopFlag) -> io::Result<()> {
    let end = Instant::now() + patience;
    stream.set_read_timeout(Some(RETRY))?;
    loop {
        go_on(stop).map_err(io::Error::other)?;
        match stream.peek(&mut [0]) {
            Ok(_) => return Ok(()),
            Err(cause) => match cause.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if Instant::now() < end => {}
                io::ErrorKind::Interrupted => {}
                _ => return Err(cause),
            },
        }
    }
}

/// The name of this machine.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    name.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).unwrap_or_else(|| "an unnamed host".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a rank of two says when its flag says stop in the middle of its wait.
    fn stopped(rank: usize, port: u16) -> String {
        let (stop, timeouts) = (StopFlag::new(), Timeouts::default());
        let master = Master::from(("127.0.0.1".to_owned(), port));
        let launch = Launch { rank, ranks: 2, local_ranks: Some(2), master: Some(master.clone()), ..Launch::alone() };
        let later = stop.clone();
        let hand = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            later.trigger();
        });
        let start = Instant::now();
        let error = meet(&launch, &master, Luggage { stop, ..Luggage::default() }, timeouts).unwrap_err().to_string();
        assert!(start.elapsed() < timeouts.start / 4, "{:?}", start.elapsed());
        hand.join().unwrap();
        error
    }

    #[test]
    fn every_wait_ends_when_the_run_is_to_stop() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        // The other side answers, and then says nothing more.
        let silent = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&MAGIC).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
        });
        let error = stopped(1, port);
        assert!(error.contains("rank 1") && error.contains("stopped by request"), "{error}");
        silent.join().unwrap();
        // Nobody listens there any more.
        let error = stopped(1, port);
        assert!(error.contains("rank 1") && error.contains("stopped by request"), "{error}");
        let error = stopped(0, 0);
        assert!(error.contains("rank 0 was stopped by request before all ranks were there"), "{error}");
    }
}
