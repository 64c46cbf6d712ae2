//! The Unix socket of `egress-agent status` and `explain`. Only root may open it.

use std::{
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
        },
        stat::{Mode, fchmod},
    },
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
};

use super::{
    Sources, Tried,
    connections::Connections,
    explain::explain,
    health,
    protocol::{REQUEST_MAX, Request, Response},
    status::status,
};

/// Most clients at once.
const CLIENTS: usize = 16;
/// How many clients may wait to be accepted.
const BACKLOG: i32 = 64;
/// How long a client may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves until the runtime ends or the future is dropped, and then removes the socket.
pub(super) async fn serve(path: &Path, sources: Arc<Sources>, tried: Tried) {
    let at = path.display().to_string();
    let bound = super::listen(&at, "status and explain", tried, async || Bound::open(path)).await;
    let mut clients = Connections::new(CLIENTS, CLIENTS, PATIENCE);
    loop {
        let Ok((stream, _)) = bound.listener.accept().await else {
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let sources = Arc::clone(&sources);
        clients.serve(None, async move {
            if let Err(error) = answer(stream, &sources).await {
                tracing::debug!(%error, "a client of the socket failed");
            }
        });
    }
}

async fn answer(mut stream: UnixStream, sources: &Sources) -> io::Result<()> {
    let response = match read_request(&mut stream).await? {
        Ok(Request::Status { pod, names }) => status(sources, pod.as_deref(), names)
            .await
            .map(|status| Response::Status(Box::new(status))),
        Ok(Request::Explain { pod, target }) => explain(sources, &pod, &target)
            .await
            .map(|explanation| Response::Explanation(Box::new(explanation))),
        Ok(Request::Ready) => Ok(Response::Ready(health::unready(sources))),
        Err(error) => Err(error),
    };
    write_response(&mut stream, &response.unwrap_or_else(Response::Error)).await
}

/// Reads a client's request. Returns the mistake if it cannot be read.
pub(super) async fn read_request(stream: &mut UnixStream) -> io::Result<Result<Request, String>> {
    let mut line = Vec::new();
    let mut reading = BufReader::new(stream).take(REQUEST_MAX as u64);
    reading.read_until(b'\n', &mut line).await?;
    Ok(serde_json::from_slice(&line).map_err(|error| {
        format!("the request is not one line of JSON that this agent understands: {error}")
    }))
}

/// Sends the response to a client.
pub(super) async fn write_response(stream: &mut UnixStream, response: &Response) -> io::Result<()> {
    let mut text = serde_json::to_vec(response)?;
    text.push(b'\n');
    stream.write_all(&text).await
}

/// The listening socket, which is removed on drop.
pub(super) struct Bound {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode, to recognise the file.
    file: (u64, u64),
}

impl Bound {
    /// Opens the socket, and replaces one that an earlier agent left behind.
    pub(super) fn open(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .with_context(|| format!("cannot create the directory {}", directory.display()))?;
        }
        remove_stale(path)?;
        let socket = unix_socket()?;
        // Set the mode before the socket has a name, so that nobody else can open it in between (unix_bind,
        // net/unix/af_unix.c, takes the mode of the socket's own inode).
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)
            .context("cannot restrict the socket to its owner")?;
        let address = UnixAddr::new(path).context("the path is too long for a Unix socket")?;
        bind(socket.as_raw_fd(), &address).context("cannot bind the socket to its path")?;
        listen(&socket, Backlog::new(BACKLOG)?).context("cannot listen")?;
        let listener = UnixListener::from_std(socket.into()).context("cannot wait for clients")?;
        Ok(Self {
            listener,
            file: file(path).context("cannot read the socket's inode")?,
            path: path.to_owned(),
        })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if file(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn unix_socket() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .context("cannot create a Unix socket")
}

fn file(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context("cannot read the type of the file at the path"),
    };
    if !metadata.file_type().is_socket() {
        bail!("a file that is not a socket is at the path; remove it, or set another `socket`");
    }
    let address = UnixAddr::new(path).context("the path is too long for a Unix socket")?;
    // A socket with a full backlog belongs to a running agent too.
    match connect(unix_socket()?.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED) => fs::remove_file(path)
            .context("cannot remove a socket that an earlier agent left behind"),
        _ => bail!("another agent answers there; give each its own `socket`"),
    }
}
