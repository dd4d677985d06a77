# shellcheck shell=bash
# What the scripts of this folder share: flags, errors, dry runs, the archive of the code. Sourced, never run.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old; install bash 4.4 or newer (macOS: brew install bash)" >&2
  exit 1
fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ARCHIVE=$ROOT/build/launch/srpo_jax.tar.gz
COMMAND=""         # the sub-command
declare -A FLAG=() # values of flags; a switch that is given has the value "yes"
TRAINING=()        # words after "--": more arguments of srpo_jax.main

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# A line of progress. Stdout is for what was asked for.
say() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
}

# The words as one line that a shell reads back as the same words.
quote() {
  local word head line=""
  for word; do
    head=""
    if [[ $word =~ ^(--[a-z0-9_.-]+=)(.+)$ ]]; then
      head=${BASH_REMATCH[1]} word=${BASH_REMATCH[2]}
    fi
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+=" $head$word"
  done
  printf '%s' "${line# }"
}

# Reads a command line into COMMAND, FLAG and TRAINING.
#   parse "SUB-COMMANDS" "FLAGS WITH A VALUE" "SWITCHES" WORD...
# Without sub-commands the first argument is "". A flag that is not given takes its value from SRPO_<NAME>.
# "-h" and "--help" call the script's function "usage", wherever they stand before "--".
parse() {
  local commands=$1 valued=" $2 " switches=" $3 dry-run " name variable word value
  shift 3
  for name in $valued $switches; do
    variable=SRPO_${name^^}
    variable=${variable//-/_}
    if [[ -n ${!variable:-} ]]; then
      [[ $switches != *" $name "* || ${!variable} == yes ]] ||
        fail "$variable=${!variable} is not yes; set it to yes, or unset it"
      FLAG[$name]=${!variable}
    fi
  done
  while (($#)); do
    word=$1
    shift
    case $word in
      --)
        TRAINING=("$@")
        break
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --*)
        name=${word#--}
        name=${name%%=*}
        if [[ $switches == *" $name "* && $word != *=* ]]; then
          FLAG[$name]=yes
        elif [[ $valued != *" $name "* ]]; then
          fail "$word is not known; see $0 --help (arguments of srpo_jax.main stand after --)"
        else
          if [[ $word == *=* ]]; then
            value=${word#*=}
          else
            (($#)) && [[ $1 != --* ]] || fail "--$name needs a value: --$name=VALUE"
            value=$1
            shift
          fi
          [[ -n $value ]] || fail "--$name is empty; give a value or leave the flag out"
          FLAG[$name]=$value
        fi
        ;;
      *)
        [[ -n $commands ]] || fail "$word is not understood; flags are written --name=value, see $0 --help"
        [[ -z $COMMAND ]] || fail "two commands, $COMMAND and $word; give one of: $commands"
        [[ " $commands " == *" $word "* ]] || fail "$word is no command; give one of: $commands"
        COMMAND=$word
        ;;
    esac
  done
  [[ -z $commands || -n $COMMAND ]] || fail "no command; give one of: $commands (see $0 --help)"
}

# Fails unless each of the named flags has a value.
require() {
  local name variable
  for name; do
    variable=SRPO_${name^^}
    [[ -n ${FLAG[$name]:-} ]] || fail "--$name is missing; give --$name=VALUE or set ${variable//-/_}"
  done
}

# Fails unless the flag's value, if it has one, is a whole number of at least LEAST.
require_number() {
  local name=$1 least=$2
  [[ -z ${FLAG[$name]:-} ]] || [[ ${FLAG[$name]} =~ ^(0|[1-9][0-9]*)$ && ${FLAG[$name]} -ge $least ]] ||
    fail "--$name=${FLAG[$name]} is not a whole number of at least $least"
}

# Fails unless the recipe is a file, given by its path in FOLDER: require_recipe FOLDER
require_recipe() {
  require config
  # "recipe.py:argument" is a recipe with an argument.
  [[ ${FLAG[config]} != /* && -f $1/${FLAG[config]%%:*} ]] ||
    fail "--config=${FLAG[config]} is no file in $1; give its path there, as configs/flux_dev_hps.py"
}

dry() { [[ -n ${FLAG[dry-run]:-} ]]; }

# Fails unless the program is installed. A dry run needs none.
require_tool() {
  dry || command -v "$1" >/dev/null || fail "$1 is not installed; $2"
}

# Runs a command, or prints it in a dry run.
run() {
  if dry; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# A comment between the commands of a dry run.
comment() {
  if dry; then printf '# %s\n' "$*"; fi
}

# The training command, after its Python, in the array TRAIN.
training_command() {
  # shellcheck disable=SC2034 # read by the scripts
  TRAIN=(-u -m srpo_jax.main "--config=${FLAG[config]}" "--workdir=${FLAG[workdir]}" "${TRAINING[@]}")
}

# Packs what an installation needs into ARCHIVE: no weights, no runs, no version control.
pack() {
  run mkdir -p "$(dirname "$ARCHIVE")" &&
    run tar -czf "$ARCHIVE" --exclude=__pycache__ -C "$ROOT" \
      setup.py pyproject.toml README.md LICENSE NOTICE configs launch srpo_jax
}
